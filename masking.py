"""
What is hidden, what the model starts from, and who may look at whom. Pure functions of tensors.

    python masking.py       # a tiny batch before and after hiding, its base, and its attention masks

A cell can be unknown to the model for two reasons: the file has no value there (`~observed`), or we took the
value away to have something to ask for (`hidden`). The model is shown the same [MASK] for both, and only the
loss knows which is which: a cell that was never there has no right answer. What is neither is known:

    known = observed & ~hidden

Masks are bool and (B, T, F), numeric columns first. The words are defined at the top of model.py.
"""
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

from data import UNK_ID, show, step_generator, tiny_batch

MOST_CELLS = 1600   # of a window, for the closed forms: their matrix has that many squared
REACH = 10.0        # standard deviations; what is further out is no matter for a covariance


class Inputs(NamedTuple):
    """What the model sees of a batch. Nothing that is hidden is in here: whoever copies it cannot leak."""
    numeric: torch.Tensor           # (B, T, N) float32, the value where known, the base elsewhere
    categorical: torch.Tensor       # (B, T, K) int64, the same for ids
    known: torch.Tensor             # (B, T, F) bool, True = a value of the table, False = [MASK]
    base: torch.Tensor              # (B, T, N) float32, the guess that the numeric head corrects
    base_ids: torch.Tensor          # (B, T, K) int64, the same for ids, 0 = nothing to guess from
    deviation: Optional[torch.Tensor]   # (B, T, N) float32, how far off a closed form takes its base to be
    clock: torch.Tensor             # (B, T, C) float32
    attend: Optional[torch.Tensor]  # (B, 1, T, T) bool, True = may look; None = no mask is needed


class Targets(NamedTuple):
    """What it is asked. Holds no NaN: what is not scored is some finite number."""
    numeric: torch.Tensor           # (B, T, N) float32
    categorical: torch.Tensor       # (B, T, K) int64
    score: torch.Tensor             # (B, T, F) bool, True = this cell counts in the loss


def move(tensors, device):
    """Inputs or Targets -> the same on the device."""
    fields = tensors._asdict()
    moved = {name: x.to(device) for name, x in fields.items() if x is not None}
    return tensors._replace(**moved)


# -----------------------------------------------------------------------------
# what is hidden

def last_true(mask):
    """For each cell of mask (B, T, F) bool the row of the last True at or before it in its column, int64, -1
    where there is none. Whatever looks back in time is built on this."""
    rows = torch.arange(mask.shape[1], device=mask.device)[:, None]             # (T, 1)
    return torch.where(mask, rows, -1).cummax(dim=1).values


def scorable(batch):
    """Cells with a right answer: (B, T, F) bool, True = observed, and not [UNK], which is no class."""
    N = batch.numeric.shape[-1]
    known_class = batch.categorical != UNK_ID                                   # (B, T, K)
    return batch.observed & F.pad(known_class, (N, 0), value=True)


def within_clip(targets, base, clip):
    """Targets without the numbers that lie, or whose base (B, T, N) lies, beyond the clip: the network sees
    numbers clipped, and cannot tell how far beyond."""
    K = targets.categorical.shape[-1]
    inside = (targets.numeric.abs() <= clip) & (base.abs() <= clip)             # (B, T, N)
    return targets._replace(score=targets.score & F.pad(inside, (0, K), value=True))


def create_masks(observed, mask_prob, generator, span=1.0):
    """Choose the cells to hide. Returns `hidden` (B, T, F) bool, True = taken away.

    observed (B, T, F) bool: no other cell is ever hidden. mask_prob: the share to hide; span: mean rows of a
    hidden run, for real holes come in runs (Zerveas 2021, section 3.3); each a float, or (B, 1, 1) for a
    value a window. Hidden or not, each column is a chain of two states. Single cells are such a chain as
    well: runs of 1 / (1 - mask_prob) rows are what independent cells make, and shorter there are none. """
    p = torch.as_tensor(mask_prob)
    length = torch.maximum(torch.as_tensor(span), 1 / (1 - p))
    stay = 1 - 1 / length                       # a hidden cell is followed by another
    enter = p / (1 - p) / length                # a run begins: then the long-run share is mask_prob
    # One draw decides: below `enter` hidden, from `stay` on not, in between as the cell before.
    u = torch.rand(observed.shape, generator=generator)                         # (B, T, F)
    first = torch.arange(observed.shape[1])[:, None] == 0                       # no cell before it
    starts = u < torch.where(first, p, enter)
    decided = first | starts | (u >= stay)
    return observed & starts.gather(1, last_true(decided))


def bert_style_masking(batch, hidden, generator, mask_share=0.8, random_share=0.1):
    """Make 80 % of the hidden cells unknown, give 10 % another value of their column, leave 10 % as they are
    (Devlin 2019, section 3.1). All are scored: a model that cannot tell which of the values it sees are true
    must judge them all. (The scripts make all unknown unless told otherwise: a real hole is [MASK], too.)

    Returns a Batch whose `observed` is what is shown; true or not, it counts as known from here on. The other
    value is that of a known cell of the column in the batch; where there is none, the cell is unknown.
    """
    # ONE number a cell decides. Two draws, "not masked", then "random", would have to be conditional
    # probabilities; whoever writes 0.8 and 0.1 there gets 80/2/18
    u = torch.rand(hidden.shape, generator=generator)                           # (B, T, F)
    donors = (scorable(batch) & ~hidden).flatten(0, 1)                          # (B*T, F)
    has_donor = donors.any(dim=0)                                               # (F,)
    random = hidden & (u >= mask_share) & (u < mask_share + random_share) & has_donor
    kept = hidden & (u >= mask_share + random_share)
    # a lender for each cell, of its own column; where no cell may lend any is drawn, and not used
    weights = (donors | ~has_donor).float().T                                   # (F, B*T)
    lender = torch.multinomial(weights, len(donors), replacement=True, generator=generator).T
    N = batch.numeric.shape[-1]
    numbers = batch.numeric.flatten(0, 1).gather(0, lender[:, :N])              # (B*T, N)
    ids = batch.categorical.flatten(0, 1).gather(0, lender[:, N:])              # (B*T, K)
    numeric = torch.where(random[..., :N], numbers.view_as(batch.numeric), batch.numeric)
    categorical = torch.where(random[..., N:], ids.view_as(batch.categorical), batch.categorical)
    shown = batch.observed & (~hidden | random | kept)
    return batch._replace(numeric=numeric, categorical=categorical, observed=shown)


def mix_up(batch, most, generator):
    """The Batch with each window's numbers mixed, up to the share `most`, with those of another window (Zhang
    2018): what ties columns linearly still holds, and no mixture comes twice, so none is learnt by heart. A
    number that is missing in either window is missing; categories and clock stay."""
    N = batch.numeric.shape[-1]
    share = most * torch.rand(len(batch.numeric), 1, 1, generator=generator)    # (B, 1, 1)
    other = batch.numeric.roll(1, dims=0)                                       # (B, T, N)
    both = batch.observed[..., :N] & batch.observed[..., :N].roll(1, dims=0)
    mixed = torch.where(both, batch.numeric + share * (other - batch.numeric), 0.0)
    observed = torch.cat([both, batch.observed[..., N:]], dim=-1)
    return batch._replace(numeric=mixed, observed=observed)


def jitter(batch, share, generator):
    """The Batch with each number off by a normal deviate times `share` times its step from the last known
    one. A roll-out goes on from its own slightly wrong rows, so training should have met some
    (Sanchez-Gonzalez 2020). A global amount would be nothing to one column and much to the next."""
    known = batch.observed[..., :batch.numeric.shape[-1]]                       # (B, T, N)
    step = last_known(batch.numeric, known).diff(dim=1)                         # (B, T - 1, N)
    step = step * (last_true(known)[:, :-1] >= 0)                               # none before the first
    step = F.pad(step, (0, 0, 1, 0))                                            # (B, T, N)
    noise = share * torch.randn(step.shape, generator=generator)
    return batch._replace(numeric=batch.numeric + step * noise)


def get_mask_probability(step, total_steps, start, end):
    """Progressive masking: linear from `start` at step 0 to `end` at step total_steps - 1, both exactly, and
    clamped outside, so that a prolonged run stays in range."""
    done = min(max(step / max(total_steps - 1, 1), 0.0), 1.0)
    return start * (1 - done) + end * done          # start + done * (end - start) can miss `end`


# -----------------------------------------------------------------------------
# what the model starts from

def neighbours(known):
    """The rows of the nearest known cells of the column, at or before each cell and at or after it, two (B,
    T, N) int64. Where one side has none it equals the other; where neither has, both are -1."""
    T = known.shape[1]
    before = last_true(known)
    after = T - 1 - last_true(known.flip(1)).flip(1)                            # T where there is none
    after = torch.where(after < T, after, before)
    before = torch.where(before >= 0, before, after)
    return before, after


def interpolate(numeric, known, time):
    """A straight line in time between the nearest known cells, held at the window's ends; where none is known
    0, the centre of the train rows. numeric and known (B, T, N), time (B, T) -> (B, T, N)."""
    before, after = neighbours(known)
    left = numeric.gather(1, before.clamp(min=0))                               # (B, T, N)
    right = numeric.gather(1, after.clamp(min=0))
    time = time[..., None].expand_as(numeric)
    start = time.gather(1, before.clamp(min=0))
    end = time.gather(1, after.clamp(min=0))
    weight = (time - start) / (end - start).clamp(min=1e-6)                     # any where left is right
    return torch.where(before >= 0, left + weight * (right - left), 0.0)


def nearest_category(categorical, known, time):
    """Between two ids lies nothing: the one nearest in time, (B, T, K), of two as near the earlier; 0 where
    none is known."""
    before, after = neighbours(known)
    time = time[..., None].expand_as(categorical)
    since = time - time.gather(1, before.clamp(min=0))
    until = time.gather(1, after.clamp(min=0)) - time
    nearest = torch.where(since.abs() <= until.abs(), before, after)
    ids = categorical.gather(1, nearest.clamp(min=0))
    return torch.where(nearest >= 0, ids, 0)


def last_known(values, known):
    """The last known number or id at or before each cell, (B, T, ...), 0 where there is none."""
    rows = last_true(known)
    return torch.where(rows >= 0, values.gather(1, rows.clamp(min=0)), 0)


# -----------------------------------------------------------------------------
# the closed forms: what a linear model of the train rows says

def train_sequences(table):
    """data.Table -> its train rows, a list of (rows, N), holes interpolated, spikes cut."""
    N = len(table.schema.numeric)
    sequences = []
    for start, end in table.segments["train"].tolist():
        rows = slice(start, end)
        x = interpolate(table.numeric[None, rows], table.observed[None, rows, :N], table.time[None, rows])
        sequences.append(x[0].float().clamp(-REACH, REACH))
    return sequences


def lag_covariance(sequences, T, own, level):
    """How the cells of a window of T rows vary together, (T*N, T*N) float64. sequences: train rows without
    holes, each (rows, N). Only the distance of two rows counts, so all windows teach the same few numbers.

    own: variance that each cell has to itself; level: that of a column's level in a window, beyond what the
    train rows show, so that a level never met is believed. """
    # zeros between the sequences: no row meets one of another sequence
    z = torch.cat([F.pad(x.double(), (0, 0, 0, T)) for x in sequences])
    count = sum(len(x) for x in sequences)
    N = z.shape[1]
    # over all rows, not over the pairs at this distance: only so no variance can come out negative
    lags = [z[:len(z) - k].T @ z[k:] / count for k in range(T)]                 # T of (N, N)
    lines = []
    for row in range(T):
        past = [lags[row - other].T for other in range(row)]
        lines.append(torch.cat(past + lags[:T - row], dim=1))                   # (N, T*N)
    same_column = torch.eye(N, dtype=z.dtype).repeat(T, T)
    return torch.cat(lines) + own * torch.eye(T * N) + level * same_column


def fit_gaussian(sequences, T):
    """The precision, the inverse of that covariance, (T*N, T*N) float32; zero for columns that do not
    move."""
    precision = lag_covariance(sequences, T, own=1e-3, level=1.0).inverse().float()
    moves = torch.cat(sequences).var(dim=0) > 1e-6                              # (N,)
    moves = moves.repeat(T)
    return precision * moves * moves[:, None]


def fill_window(cells, deviation, unknown, precision):
    """Set the unknown ones of the cells of a window (T*N,) and their deviation, in place. With precision Q
    the unknown cells u solve Q_uu x_u = -Q_uk x_k."""
    u = unknown.nonzero()[:, 0]                                                 # (U,)
    Q = precision[u]                                                            # (U, T*N)
    L = torch.linalg.cholesky(Q[:, u])
    cells[u] = -torch.cholesky_solve((Q @ cells)[:, None], L)[:, 0]
    deviation[u] = torch.cholesky_inverse(L).diagonal().sqrt()


def gaussian_fill(line, known, precision):
    """The mean of the unknown cells given the known ones, and its standard deviation, two (B, T, N), if the
    rows are Gaussian. line (B, T, N): the values where known (B, T, N), interpolated elsewhere.

    Out of reach (a spike, a level never met) and in columns that do not move the line stays, with deviation
    0, and nothing is concluded from it. """
    moves = precision.diagonal() > 0                                            # (T*N,)
    reached = (line.abs() < REACH).flatten(1) & moves                           # (B, T*N)
    given = known.flatten(1) & reached
    x = torch.where(given, line.flatten(1), 0.0)
    deviation = torch.zeros_like(x)
    # a thread a window, for each has unknown cells of its own, and these matrices are too small to share
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill_window, x, deviation, moves & ~given, [precision] * len(x)))
    torch.set_num_threads(threads)
    solved = reached & ~given
    base = torch.where(solved, x, line.flatten(1))
    return base.view_as(line), (deviation * solved).view_as(line)


def fit_autoregression(sequences, T):
    """(T*N, T*N) float32: each step from a row to the next as the mean given all steps before it in the
    window. Steps, not values: so it goes on from any level.

    S = L L^T, and L^-1 x is what is new in each step; a step less its own news is its mean. """
    steps = [x.diff(dim=0) for x in sequences]
    unit = torch.cat(steps).square().mean(dim=0).sqrt().clamp(min=1e-6)         # (N,)
    L = torch.linalg.cholesky(lag_covariance([x / unit for x in steps], T, own=0.03, level=0.0))
    N = len(unit)
    own = torch.block_diag(*[L[i:i + N, i:i + N] for i in range(0, T * N, N)])
    regression = torch.eye(T * N) - own @ L.inverse()                           # of steps in that unit
    earlier = torch.ones(T, T).tril(-1).kron(torch.ones(N, N))  # not but for rounding
    unit = unit.repeat(T)
    return (regression * earlier * unit[:, None] / unit).float()


def autoregress(last, regression):
    """For each row the row after it, (B, T, N): last (B, T, N) are the last known values."""
    steps = F.pad(last.diff(dim=1), (0, 0, 0, 1)).flatten(1)        # the last is not used
    n = steps.shape[1]
    return last + (steps @ regression[:n, :n].T).view_as(last)


# -----------------------------------------------------------------------------
# who may look

def padding_mask(valid):
    """valid (B, T) bool, True = a real row -> (B, 1, 1, T) bool, True = this key may be looked at. Only KEYS
    are masked: a query that may look at nothing takes the softmax of -inf alone, which is NaN."""
    return valid[:, None, None, :]


def causal_mask(T):
    """(T, T) bool, True = the query (line) may look at the key (column): at itself and the past."""
    return torch.ones(T, T, dtype=torch.bool).tril()


def create_attention_mask(valid, causal):
    """valid (B, T) bool -> `attend` (B, 1, T, T) bool for scaled_dot_product_attention, True = may look.

    A row may always look at itself, so no softmax is empty. Rows full of [MASK] stay attendable: they still
    have a clock, a place, and the base.
    """
    T = valid.shape[1]
    attend = padding_mask(valid).expand(-1, 1, T, T)
    if causal:
        attend = attend & causal_mask(T)
    return attend | torch.eye(T, dtype=torch.bool)


def create_inputs(batch, causal, closed_form=None):
    """data.Batch, whose `observed` (B, T, F) is what is known, -> Inputs. closed_form: the matrix of
    fit_gaussian, causal of fit_autoregression, for a better base than the straight line or the last value."""
    N = batch.numeric.shape[-1]
    known_numbers = batch.observed[..., :N]
    known_ids = batch.observed[..., N:]
    deviation = None
    if causal:
        numeric = last_known(batch.numeric, known_numbers)
        base = numeric
        base_ids = last_known(batch.categorical, known_ids)
        if closed_form is not None:
            base = autoregress(numeric, closed_form)
    else:
        base = interpolate(batch.numeric, known_numbers, batch.time)
        base_ids = nearest_category(batch.categorical, known_ids, batch.time)
        if closed_form is not None:
            base, deviation = gaussian_fill(base, known_numbers, closed_form)
        numeric = torch.where(known_numbers, batch.numeric, base)
    # No mask where there is nothing to mask, so that the fastest kernel can run. Causal, padding needs none:
    # it is on the right, in the future of every real row.
    attend = None
    if not causal and not batch.valid.all():
        attend = create_attention_mask(batch.valid, causal=False)
    return Inputs(numeric=numeric, categorical=torch.where(known_ids, batch.categorical, base_ids),
                  known=batch.observed, base=base, base_ids=base_ids, deviation=deviation,
                  clock=batch.clock, attend=attend)


if __name__ == "__main__":
    table, batch = tiny_batch()
    print("the batch: scaled values and ids, ? = missing in the file", show(table.schema, batch), sep="\n")
    hidden = create_masks(scorable(batch), 0.3, step_generator(2))
    known = batch._replace(observed=batch.observed & ~hidden)
    print("\nknown: what is left after hiding 30 %", show(table.schema, known), sep="\n")
    for causal in (False, True):
        inputs = create_inputs(known, causal)
        seen = batch._replace(numeric=inputs.numeric, categorical=inputs.categorical, observed=hidden | True)
        print(f"\nwhat the model sees, causal={causal}: the base where nothing is known")
        print(show(table.schema, seen))
        print("who may look at whom in window 1: a line a query, 1 = may look at this key")
        print(create_attention_mask(batch.valid, causal)[1, 0].int())
