"""
What is hidden, what the model starts from, and who may look at whom. Pure functions of tensors.

    python masking.py       # a tiny batch before and after hiding, its base, and its attention masks

A cell can be unknown to the model for two reasons: the file has no value there (`~observed`), or we took the
value away to have something to ask for (`hidden`). The model is shown the same [MASK] for both, and only the
loss knows which is which: a cell that was never there has no right answer. What is neither is known:

    known = observed & ~hidden

Masks of cells are bool, (B, T, F), numeric columns first. The words are defined at the top of model.py.
"""
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import UNK_ID, Batch, show, step_generator, tiny_batch

class Inputs(NamedTuple):
    """What the model sees, nothing hidden in it: a copy cannot leak. (The future is is_causal's to keep.)"""
    numeric: torch.Tensor           # (B, T, N) float32, known values, and a line between; causal: the last
    categorical: torch.Tensor       # (B, T, K) int64, the same for ids; 0 = nothing to guess from
    known: torch.Tensor             # (B, T, F) bool, True = a value of the table, False = [MASK]
    base: torch.Tensor              # (B, T, N) float32, what the head corrects; causal: of the next row
    deviation: torch.Tensor | None  # (B, T, N) float32, how far off a closed form takes its base to be
    clock: torch.Tensor             # (B, T, C) float32
    attend: torch.Tensor | None     # (B, 1, T, T) bool, True = may look; None = no mask is needed


class Targets(NamedTuple):
    """What it is asked. Holds no NaN: what is not scored is some finite number."""
    numeric: torch.Tensor           # (B, T, N) float32
    categorical: torch.Tensor       # (B, T, K) int64
    score: torch.Tensor             # (B, T, F) bool, True = this cell counts in the loss


# ---- what is hidden

def last_true(mask):
    """The row of the last True at or before each cell of mask (B, T, F) bool, in its column; -1 = none."""
    rows = torch.arange(mask.shape[1])[:, None]                                 # (T, 1)
    return torch.where(mask, rows, -1).cummax(dim=1).values


def scorable(batch):
    """Cells with a right answer: (B, T, F) bool, True = observed, and not [UNK], which is no class."""
    N = batch.numeric.shape[-1]
    has_class = batch.categorical != UNK_ID                                     # (B, T, K)
    return batch.observed & F.pad(has_class, (N, 0), value=True)


def create_masks(observed, mask_prob, generator, span=1.0):
    """Which of the cells `observed` (B, T, F) to hide: `hidden` (B, T, F) bool, True = taken away. mask_prob:
    the share; span: the mean rows of a hidden run, as real holes come in runs (Zerveas 2021, section 3.3);
    floats, or (B, 1, 1). Each column is a chain of two states, hidden or not. Independent cells are such a
    chain, too, that with the shortest runs: 1 / (1 - mask_prob) rows on average."""
    p = torch.as_tensor(mask_prob)
    length = torch.maximum(torch.as_tensor(span), 1 / (1 - p))
    stay = 1 - 1 / length                       # the chance that a hidden cell is followed by another
    enter = p / (1 - p) / length                # and that a run begins: so the long-run share is mask_prob
    # One draw decides: below `enter` hidden, from `stay` on not, in between as the cell before.
    u = torch.rand(observed.shape, generator=generator)                         # (B, T, F)
    hidden = u < enter
    decided = hidden | (u >= stay)
    hidden[:, :1] = u[:, :1] < p                # the first row has no cell before it
    decided[:, :1] = True
    return observed & hidden.gather(1, last_true(decided))


def hide(batch, hidden):
    """The Batch without the cells `hidden` (B, T, F): what is left is what is known."""
    known = batch.observed & ~hidden
    N = batch.numeric.shape[-1]
    return batch._replace(numeric=batch.numeric * known[..., :N], observed=known,
                          categorical=batch.categorical * known[..., N:])


def get_mask_probability(step, total_steps, start, end):
    """Progressive masking: linear from `start` at step 0 to `end` at total_steps - 1, both exactly."""
    done = step / max(total_steps - 1, 1)
    done = min(max(done, 0.0), 1.0)                 # a prolonged run stays in range
    return start * (1 - done) + end * done          # start + done * (end - start) can miss `end`


# ---- what the model starts from: known cells, and guesses from them; 0 in a column without any

def last_known(values, known):
    """The last known number or id at or before each cell, (B, T, ...); 0 where there is none."""
    values = torch.where(known, values, 0)
    rows = last_true(known).clamp(min=0)            # where there is none, row 0 is not known either
    return values.gather(1, rows)


def neighbours(values, known, time):
    """The nearest known cells of the column at or before each cell and at or after it, and how far it is in
    time from one to the other, 0 to 1: three (B, T, ...). A side without any is as the other, or else 0."""
    T = known.shape[1]
    before = last_true(known)                                                   # -1 where there is none
    after = T - 1 - last_true(known.flip(1)).flip(1)                            # T where there is none
    after = torch.where(after < T, after, before).clamp(min=0)
    before = torch.where(before >= 0, before, after)
    time = time[..., None].expand(known.shape)
    start = time.gather(1, before)                  # when these were
    length = time.gather(1, after) - start
    way = (time - start) / length.clamp(min=1e-6)   # length 0: both are one cell, and any way will do
    values = torch.where(known, values, 0)
    return values.gather(1, before), values.gather(1, after), way


def interpolate(numeric, known, time):
    """Numbers (B, T, N), where unknown on a straight line in time (B, T), held at the window's ends."""
    left, right, way = neighbours(numeric, known, time)                         # (B, T, N) each
    return left + way * (right - left)


def nearest_category(categorical, known, time):
    """Between two ids lies nothing: the one nearest in time, (B, T, K), of two as near the earlier."""
    left, right, way = neighbours(categorical, known, time)                     # (B, T, K) each
    return torch.where(way <= 0.5, left, right)


# ---- who may look

def padding_mask(valid):
    """valid (B, T) bool, True = a real row -> (B, 1, 1, T) bool, True = this key may be looked at."""
    return valid[:, None, None, :]      # KEYS alone: a query without any has a softmax of -inf, which is NaN


def causal_mask(T):
    """(T, T) bool, True = the query (line) may look at the key (column): what is_causal=True stands for."""
    return torch.ones(T, T, dtype=torch.bool).tril()


def create_attention_mask(valid):
    """valid (B, T) bool -> `attend` (B, 1, T, T) bool, True = may look; `& causal_mask(T)` at the past alone.
    Rows full of [MASK] stay attendable: they still have a clock, a place, and the base."""
    itself = torch.eye(valid.shape[1], dtype=torch.bool)
    return padding_mask(valid) | itself                 # or padding alone would have an empty softmax


def create_inputs(batch, causal, closed_form=None):
    """data.Batch, whose `observed` (B, T, F) is what is known, -> Inputs. closed_form: what fit_closed_form
    returns, for a better base than the straight line or the last value."""
    N = batch.numeric.shape[-1]
    known = batch.observed[..., :N]
    known_ids = batch.observed[..., N:]
    deviation = None
    attend = None       # causal: padding is on the right, in the future of every real row
    if causal:
        ids = last_known(batch.categorical, known_ids)
        numeric = last_known(batch.numeric, known)
        base = numeric if closed_form is None else autoregress(numeric, closed_form)
    else:
        ids = nearest_category(batch.categorical, known_ids, batch.time)
        numeric = interpolate(batch.numeric, known, batch.time)
        base = numeric                                  # that of a known cell is the cell
        if closed_form is not None:
            base, deviation = gaussian_fill(numeric, known, closed_form)
        if not batch.valid.all():                       # without a mask the fastest kernel can run
            attend = create_attention_mask(batch.valid)
    return Inputs(numeric=numeric, categorical=ids, known=batch.observed, base=base, deviation=deviation,
                  clock=batch.clock, attend=attend)


# ---- the rest can be skipped at first reading

def move(tensors, device):
    """Inputs or Targets -> the same on the device."""
    moved = {name: x.to(device) for name, x in tensors._asdict().items() if x is not None}
    return tensors._replace(**moved)


def within_clip(targets, base, clip):
    """Targets without the scores of numbers that are beyond the clip, or whose base (B, T, N) is: the network
    sees these clipped."""
    K = targets.categorical.shape[-1]
    farther = torch.maximum(targets.numeric.abs(), base.abs())                  # (B, T, N)
    inside = F.pad(farther <= clip, (0, K), value=True)                         # (B, T, F)
    return targets._replace(score=targets.score & inside)


def bert_style_masking(batch, hidden, generator, mask_share=0.8, random_share=0.1):
    """Make 80 % of the hidden cells unknown, give 10 % another value of their column, leave 10 % as they are
    (Devlin 2019, section 3.1). All are scored: a model that cannot tell which of the values it sees are true
    must judge them all. Returns the Batch that is shown, true or not."""
    # ONE number a cell decides; whoever draws twice, "not masked", then "random", gets 80/2/18
    u = torch.rand(hidden.shape, generator=generator)                           # (B, T, F)
    kept = u >= mask_share + random_share
    # the other value is that of a known cell of the column in the batch; where there is none, it is unknown
    donors = (scorable(batch) & ~hidden).flatten(0, 1)                          # (B*T, F)
    weights = (donors | ~donors.any(dim=0)).float().T       # (F, B*T); from no donor it must draw as well
    lender = torch.multinomial(weights, len(donors), replacement=True, generator=generator).T
    lends = donors.gather(0, lender).view_as(hidden)                            # (B, T, F)
    random = hidden & (u >= mask_share) & ~kept & lends
    cells = torch.cat([batch.numeric, batch.categorical.float()], dim=-1)       # (B, T, F)
    lent = cells.flatten(0, 1).gather(0, lender)                                # (B*T, F)
    cells = torch.where(random, lent.view_as(cells), cells)
    N = batch.numeric.shape[-1]
    batch = batch._replace(numeric=cells[..., :N], categorical=cells[..., N:].long())
    return hide(batch, hidden & ~random & ~kept)


# the closed forms: what a linear model of the train rows says

MOST_CELLS = 1600   # of a window: their matrix has that many squared
REACH = 10.0        # standard deviations; what is further out tells nothing about its neighbours


def fit_closed_form(table, causal):
    """What gaussian_fill needs, causal autoregress, from the train rows of a data.Table, holes interpolated,
    spikes cut; None where it would be too large."""
    N = len(table.schema.numeric)
    if not 0 < table.seq_len * N <= MOST_CELLS:
        print("no closed form: --seq_len times the numeric columns is 0, or too large")
        return None
    sequences = []
    for start, end in table.segments["train"].tolist():
        numeric = table.numeric[start:end]                                      # (rows, N)
        known = table.observed[start:end, :N]
        line = interpolate(numeric[None], known[None], table.time[None, start:end])
        sequences.append(line[0].float().clamp(-REACH, REACH))
    fit = fit_autoregression if causal else fit_gaussian
    return fit(sequences, table.seq_len)


def lag_covariance(sequences, T, own, level):
    """How the cells of a window of T rows vary together, (T*N, T*N) float64, by the distance of their rows.
    sequences: train rows without holes, each (rows, N); own: variance that each cell has to itself; level:
    that of a column's level in a window, beyond what the rows show, so that a level never met is believed."""
    # zeros between the sequences: no row meets one of another sequence
    apart = [F.pad(x.double(), (0, 0, 0, T)) for x in sequences]
    z = torch.cat(apart)
    count = sum(len(x) for x in sequences)
    # over all rows, not over the pairs at this distance: only so no variance can come out negative
    future = [z[:len(z) - k].T @ z[k:] / count for k in range(T)]               # (N, N), k rows later
    past = [lag.T for lag in future]
    lines = []
    for t in range(T):                              # the rows before row t, itself, and those after it
        lines.append(torch.cat(past[t:0:-1] + future[:T - t], dim=1))           # (N, T*N)
    same_column = torch.eye(z.shape[1], dtype=z.dtype).repeat(T, T)             # (T*N, T*N)
    return torch.cat(lines) + own * torch.eye(len(same_column)) + level * same_column


def fit_gaussian(sequences, T):
    """The precision, the inverse of that covariance, (T*N, T*N) float32; 0 for columns that do not move."""
    covariance = lag_covariance(sequences, T, own=1e-3, level=1.0)
    precision = covariance.inverse().float()
    moves = torch.cat(sequences).var(dim=0) > 1e-6                              # (N,)
    moves = moves.repeat(T)                                                     # (T*N,)
    return precision * moves * moves[:, None]


def gaussian_fill(line, known, precision):
    """The mean of the unknown cells given the known ones, and its standard deviation, two (B, T, N), if rows
    are Gaussian. line (B, T, N): values where known (B, T, N), interpolated elsewhere; it stays, and tells
    nothing, out of reach (a spike, a level never met) and in columns that do not move: deviation 0."""
    cells = line.flatten(1)                                                     # (B, T*N)
    moves = precision.diagonal() > 0                                            # (T*N,)
    reached = (cells.abs() < REACH) & moves
    given = known.flatten(1) & reached
    x = torch.where(given, cells, 0.0)
    deviation = torch.zeros_like(x)

    def solve(b):
        # with precision Q the unknown cells u of window b have the mean Q_uu x_u = -Q_uk x_k
        u = (moves & ~given[b]).nonzero()[:, 0]                                 # (U,)
        Q = precision[u]                                                        # (U, T*N)
        L = torch.linalg.cholesky(Q[:, u])
        right = -(Q @ x[b])[:, None]                                            # (U, 1), for x_u is still 0
        x[b, u] = torch.cholesky_solve(right, L)[:, 0]
        deviation[b, u] = torch.cholesky_inverse(L).diagonal().sqrt()

    # a thread a window, for these matrices are too small to be shared
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(solve, range(len(x))))
    torch.set_num_threads(threads)
    base = torch.where(reached, x, cells)
    deviation = torch.where(reached, deviation, 0.0)
    return base.view_as(line), deviation.view_as(line)


def fit_autoregression(sequences, T):
    """Each step from a row to the next as the mean given all steps before it in the window, (T*N, T*N)
    float32; and how large a step may be to count, (T*N,). Steps, not values: so it goes on from any level.
    S = L L^T, and L^-1 x is what is new in each step; a step less its own news is its mean."""
    steps = [x.diff(dim=0) for x in sequences]
    square = torch.cat(steps).square().mean(dim=0)                              # (N,)
    unit = square.sqrt().clamp(min=1e-6)            # a column may not move
    S = lag_covariance([x / unit for x in steps], T, own=0.03, level=0.0)
    L = torch.linalg.cholesky(S)                                                # (T*N, T*N)
    row = torch.arange(T).repeat_interleave(len(unit))                          # (T*N,), that of each cell
    own = torch.where(row[:, None] == row, L, 0.0)
    regression = torch.eye(len(L)) - own @ L.inverse()                          # of steps in that unit
    regression = torch.where(row[:, None] > row, regression, 0.0)               # or rounding would stay
    unit = unit.repeat(T)                                                       # (T*N,)
    return (regression * unit[:, None] / unit).float(), (REACH * unit).float()


def autoregress(last, closed_form):
    """For each row the row after it, (B, T, N), from the last known values. A step out of reach is none."""
    regression, reach = closed_form
    steps = F.pad(last.diff(dim=1), (0, 0, 0, 1)).flatten(1)        # (B, T*N), the last is not used
    n = steps.shape[1]
    steps = torch.where(steps.abs() < reach[:n], steps, 0.0)
    following = steps @ regression[:n, :n].T
    return last + following.view_as(last)


# ---- what training does to its windows

def mix_up(batch, most, generator):
    """The Batch with the numbers of each window mixed, up to the share `most`, with those of another (Zhang
    2018): what ties columns linearly still holds, and no mixture comes twice, so none is learnt by heart. A
    number that is missing in either window is missing; categories and clock stay."""
    N = batch.numeric.shape[-1]
    share = most * torch.rand(len(batch.valid), 1, 1, generator=generator)      # (B, 1, 1)
    other = batch.numeric.roll(1, dims=0)                                       # (B, T, N)
    mixed = batch.numeric + share * (other - batch.numeric)
    observed = batch.observed & batch.observed.roll(1, dims=0)                  # (B, T, F)
    observed[..., N:] = batch.observed[..., N:]
    return batch._replace(numeric=mixed * observed[..., :N], observed=observed)


def jitter(batch, share, generator):
    """The Batch with each number off by a normal deviate times `share` times its step from the last known
    one: a roll-out goes on from slightly wrong rows, so training should meet some (Sanchez-Gonzalez 2020)."""
    N = batch.numeric.shape[-1]
    known = batch.observed[..., :N]                                             # (B, T, N)
    last = last_known(batch.numeric, known)
    step = last.diff(dim=1, prepend=last[:, :1])                                # (B, T, N)
    step = torch.where(known.cumsum(dim=1) > 1, step, 0.0)      # from nothing to a first number is no step
    noise = share * torch.randn(step.shape, generator=generator)
    return batch._replace(numeric=batch.numeric + step * noise)


if __name__ == "__main__":
    table, batch = tiny_batch()
    hidden = create_masks(scorable(batch), 0.3, step_generator(2))
    shown = hide(batch, hidden)
    print("the batch: scaled values and ids, ? = missing in the file", show(table.schema, batch), sep="\n")
    print("\nshown: what is left after hiding 30 %", show(table.schema, shown), sep="\n")
    for causal in (False, True):
        inputs = create_inputs(shown, causal)
        everywhere = torch.ones_like(hidden)
        seen = Batch(inputs.numeric, inputs.categorical, everywhere, batch.valid, batch.clock, batch.time)
        print(f"\nwhat the model sees, causal={causal}: a guess where nothing is known")
        print(show(table.schema, seen))
    attend = create_attention_mask(batch.valid)
    print("\nwho may look at whom in window 1: a line a query, 1 = may look at this key")
    print(attend[1, 0].int(), "causal", (attend & causal_mask(6))[1, 0].int(), sep="\n")
