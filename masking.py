"""
What is hidden, what is pencilled in, and who may look at whom. Pure functions of tensors.

    python masking.py       # a tiny batch before and after hiding, pencilled in, and its attention masks

A cell can be unknown to the model for two reasons: the file has no value there (`~observed`), or we took the
value away to have something to ask for (`hidden`). The model is shown the same [MASK] for both, and only the
loss knows which is which: a cell that was never there has no right answer. What is neither is known:

    known = observed & ~hidden

Masks are bool and (B, T, F), numeric columns first. The words are defined once, at the top of model.py.
"""
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

UNK_ID = 1      # a category never seen in the train rows; id 0 is [MASK], a column's own values start at 2


class Inputs(NamedTuple):
    """What the model gets to see of a batch. A training script's objective fills it in."""
    numeric: torch.Tensor           # (B, T, N) float32, read only where `shown`, else `pencil` is
    categorical: torch.Tensor       # (B, T, K) int64, likewise
    shown: torch.Tensor             # (B, T, F) bool, True = the embedding gets a value here and not [MASK]
    known: torch.Tensor             # (B, T, F) bool, True = observed and not hidden: to be built upon
    pencil: torch.Tensor            # (B, T, N) float32, the guess that the model starts from
    pencil_ids: torch.Tensor        # (B, T, K) int64, the same for categories, 0 = nothing to guess from
    clock: torch.Tensor             # (B, T, C) float32
    attend: Optional[torch.Tensor]  # (B, 1, T, T) bool, True = query may look at key; None = no mask is
                                    # needed, beside that of a causal model


class Targets(NamedTuple):
    """What it is asked, cell by cell. Holds no NaN: what is not scored is some finite number."""
    numeric: torch.Tensor           # (B, T, N) float32
    categorical: torch.Tensor       # (B, T, K) int64
    score: torch.Tensor             # (B, T, F) bool, True = this cell counts in the loss


def move(tensors, device):
    """Inputs or Targets -> the same on the device."""
    # None: no attention mask was needed
    return type(tensors)(*(t if t is None else t.to(device) for t in tensors))


# -----------------------------------------------------------------------------
# what is hidden

def last_true(mask):
    """For each cell the row of the last True at or before it in its column, -1 where there is none.

    mask (B, T, F) bool; returns (B, T, F) int64. Whatever looks back in time is built on this.
    """
    rows = torch.arange(mask.shape[1], device=mask.device)[None, :, None]       # (1, T, 1)
    return torch.where(mask, rows, -1).cummax(dim=1).values


def scorable(observed, categorical):
    """Cells with a right answer: (B, T, F) bool, True = observed, and not [UNK], which is no class."""
    n_numeric = observed.shape[-1] - categorical.shape[-1]
    return observed & F.pad(categorical != UNK_ID, (n_numeric, 0), value=True)


def create_masks(observed, mask_prob, generator, style="cell", span=12):
    """Choose the cells to hide. Returns `hidden` (B, T, F) bool, True = taken away.

    observed: (B, T, F) bool, True = there is a value to take away; no other cell is ever hidden.
    mask_prob: a float, or a tensor that broadcasts to (B, T, F), such as (B, 1, 1) for a rate a window.
    style: "cell" hides each cell on its own; "span" hides runs of rows in a column, of geometric length with
    mean `span`, at the same expected rate (Zerveas 2021, section 3.3), because real gaps are runs.
    Nothing hidden is a legal outcome. Raises ValueError where spans that short cannot reach the rate.
    """
    u = torch.rand(observed.shape, generator=generator)                         # (B, T, F)
    if style == "cell":
        return observed & (u < mask_prob)
    # Each column is a chain of two states. A hidden cell is followed by a hidden one with probability `stay`;
    # `enter`, the chance of a run to begin, then makes the long-run rate mask_prob. One draw decides: below
    # `enter` hidden, above `stay` not hidden, and in between the cell does as the cell before it.
    mask_prob = torch.as_tensor(mask_prob)
    enter, stay = mask_prob / (1 - mask_prob) / span, 1 - 1 / span
    if (enter > stay + 1e-6).any():
        raise ValueError(f"runs of {span} rows cannot hide {float(mask_prob.max()):.0%} of the cells")
    first = torch.arange(observed.shape[1])[None, :, None] == 0                 # no cell stands before row 0
    hidden = u < torch.where(first, mask_prob, enter)
    decided = first | hidden | (u >= stay)
    return observed & hidden.gather(1, last_true(decided))


def bert_style_masking(numeric, categorical, observed, hidden, generator, mask_share=0.8, random_share=0.1):
    """Of the hidden cells show 80 % as [MASK], 10 % as another value of the same column, 10 % as they are
    (Devlin 2019, section 3.1). All are scored: a model that cannot tell which of the values it sees are true
    must judge them all. (The scripts show all as [MASK] unless told otherwise; the README says why.)

    numeric (B, T, N) float32, categorical (B, T, K) int64, observed and hidden (B, T, F) bool.
    Returns numeric and categorical as shown, and `shown` (B, T, F) bool, True = a value and not [MASK].
    The other value is that of a known cell elsewhere in the batch, so no special id and no missing cell's 0;
    a column without such a cell falls back to [MASK].
    """
    # ONE uniform number a cell decides. Two draws, "not masked", then "random", would have to be conditional
    # probabilities; whoever writes 0.8 and 0.1 there gets 80/2/18
    u = torch.rand(hidden.shape, generator=generator)                           # (B, T, F)
    n_numeric = numeric.shape[-1]
    donor = (scorable(observed, categorical) & ~hidden).flatten(0, 1)           # (B*T, F) True = may lend
    random = hidden & (u >= mask_share) & (u < mask_share + random_share) & donor.any(dim=0)
    kept = hidden & (u >= mask_share + random_share)
    masked = hidden & ~random & ~kept

    # All donors in one list, column after column; a cell draws from its own column's stretch of that list.
    donor_row = donor.T.nonzero()[:, 1]
    count = donor.sum(dim=0)                                                    # (F,) length of each stretch
    end = count.cumsum(dim=0)                                                   # (F,) and where it ends
    row, column = random.flatten(0, 1).nonzero().unbind(1)
    v = torch.rand(len(column), generator=generator)
    pick = (end - count)[column] + (v * count[column]).long()
    lender = donor_row[torch.minimum(pick, end[column] - 1)]                    # v * count may round up

    def lend(values, here, j):
        lent = values.flatten(0, 1).clone()                                     # (B*T, N or K)
        lent[row[here], j[here]] = lent[lender[here], j[here]]
        return lent.view(values.shape)

    return (lend(numeric, column < n_numeric, column),
            lend(categorical, column >= n_numeric, column - n_numeric), observed & ~masked)


def mix_up(batch, most, generator):
    """The Batch with each window's numbers mixed, up to the share `most`, with those of another window of the
    batch (Zhang 2018). What ties columns linearly holds in a mixture, and no mixture comes twice, so none is
    learnt by heart. A number that is missing in either window is missing; categories and clock stay.
    most 0: the batch as it is, and nothing is drawn.
    """
    if not most:
        return batch
    numeric, observed, N = batch.numeric, batch.observed, batch.numeric.shape[-1]
    part = most * torch.rand(len(numeric), 1, 1, generator=generator)           # (B, 1, 1)
    both = observed[..., :N] & observed[..., :N].roll(1, dims=0)                # (B, T, N)
    mixed = torch.where(both, numeric + part * (numeric.roll(1, dims=0) - numeric), 0.0)
    return batch._replace(numeric=mixed, observed=torch.cat([both, observed[..., N:]], dim=-1))


def get_mask_probability(step, total_steps, start, end):
    """Progressive masking: linear from `start` at step 0 to `end` at step total_steps - 1, both exactly.

    Clamped outside, so that a resumed or prolonged run stays in range; defined for 0 and 1 steps as well.
    """
    done = min(max(step / max(total_steps - 1, 1), 0.0), 1.0)
    return start * (1 - done) + end * done          # start + done * (end - start) can miss `end`


# -----------------------------------------------------------------------------
# what is pencilled in

def neighbours(known, causal):
    """For each cell the rows of the nearest known cells of its column, at or before it and at or after it.

    known (B, T, N) bool; returns two (B, T, N) int64. Where one side has none it equals the other; where
    neither has, both are -1. Causal: the future has none, so both are the last known row.
    """
    T = known.shape[1]
    before = last_true(known)
    if causal:
        return before, before
    after = last_true(known.flip(1)).flip(1)                                    # counted from the end
    after = torch.where(after >= 0, T - 1 - after, -1)
    return torch.where(before >= 0, before, after), torch.where(after >= 0, after, before)


def pencil_in(numeric, known, causal):
    """What a person would pencil into an unknown cell. Returns (B, T, N) float32, `numeric` where known.

    numeric (B, T, N) float32; known (B, T, N) bool: observed and not hidden, so never a random or kept cell
    of 80/10/10, whose value may be a lie or must not be given away.
    Both ways: linear interpolation between the nearest known cells of the column, held at the window's ends.
    Causal: the last known value. No known cell: 0, the centre of the column's train rows.
    """
    before, after = neighbours(known, causal)
    left, right = (numeric.gather(1, rows.clamp(min=0)) for rows in (before, after))        # (B, T, N)
    rows = torch.arange(known.shape[1], device=known.device)[None, :, None]
    weight = (rows - before) / (after - before).clamp(min=1)            # any will do where left is right
    return torch.where(before >= 0, left + weight * (right - left), 0.0)


def pencil_category(categorical, known, causal):
    """The same for ids, (B, T, K) int64, where nothing lies between two values: the nearest known one (the
    earlier of two as near); causal: the last one. No known cell: 0."""
    before, after = neighbours(known, causal)
    rows = torch.arange(known.shape[1], device=known.device)[None, :, None]
    nearest = torch.where((rows - before).abs() <= (after - rows).abs(), before, after)
    return torch.where(nearest >= 0, categorical.gather(1, nearest.clamp(min=0)), 0)


def jitter(numeric, known, share, generator):
    """Numbers slightly off: by a normal deviate times `share` times their step from the last known row.

    numeric (B, T, N) float32; known (B, T, N) bool, True = known. Who rolls out goes on from rows that are
    slightly off, so training should have met some (Sanchez-Gonzalez 2020). Scaled by a step, since a global
    amount is nothing to one column and much to the next; what does not move stays exact.
    """
    step = pencil_in(numeric, known, causal=True).diff(dim=1)                   # (B, T - 1, N)
    step = step * (last_true(known)[:, :-1] >= 0)                               # none before the first known
    return numeric + F.pad(step, (0, 0, 1, 0)) * share * torch.randn(numeric.shape, generator=generator)


# -----------------------------------------------------------------------------
# who may look

def padding_mask(valid):
    """valid (B, T) bool, True = a real row -> (B, 1, 1, T) bool, True = this key may be looked at.

    Only KEYS are masked: a query that may look at nothing takes the softmax of -inf alone, which is NaN.
    """
    return valid[:, None, None, :]


def causal_mask(T, device=None):
    """(1, 1, T, T) bool, True = the query (line) may look at the key (column): itself and the past."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()[None, None]


def create_attention_mask(valid, causal):
    """valid (B, T) bool -> `attend` (B, 1, T, T) bool for F.scaled_dot_product_attention, True = may look.

    The diagonal is always allowed, so no softmax is empty. Rows full of [MASK] stay attendable: they still
    have a clock, a place, and what is pencilled in.
    """
    T, attend = valid.shape[1], padding_mask(valid)                             # (B, 1, 1, T)
    if causal:
        attend = attend & causal_mask(T, valid.device)                          # (B, 1, T, T)
    return attend | torch.eye(T, dtype=torch.bool, device=valid.device)


def create_inputs(batch, known, causal):
    """data.Batch and what is known of it, (B, T, F) bool -> Inputs: what is known is shown, the rest is
    pencilled in."""
    N = batch.numeric.shape[-1]
    # No mask where there is nothing to mask, so that the fastest kernel can run. Causal, padding needs none:
    # it is on the right, in the future of every real row
    attend = None if causal or batch.valid.all() else create_attention_mask(batch.valid, causal)
    return Inputs(batch.numeric, batch.categorical, known, known,
                  pencil_in(batch.numeric, known[..., :N], causal),
                  pencil_category(batch.categorical, known[..., N:], causal), batch.clock, attend)


if __name__ == "__main__":
    from data import show, step_generator, tiny_batch                   # for this demonstration only

    table, batch = tiny_batch()
    N, generator, everywhere = len(table.schema.numeric), step_generator(2), torch.ones_like(batch.observed)
    hidden = create_masks(scorable(batch.observed, batch.categorical), 0.3, generator)
    known = batch.observed & ~hidden
    numeric, categorical, shown = bert_style_masking(*batch[:3], hidden, generator)

    def pencilled(causal):
        return (pencil_in(batch.numeric, known[..., :N], causal),
                pencil_category(batch.categorical, known[..., N:], causal), everywhere)

    for title, cells in (
            ("the batch: scaled values and ids, ? = missing in the file", batch[:3]),
            ("known: what is left after hiding 30 %", (batch.numeric, batch.categorical, known)),
            ("shown: with 80/10/10 some come back, true or not", (numeric, categorical, shown)),
            ("pencilled in, both ways: between the nearest known cells", pencilled(causal=False)),
            ("pencilled in, causal: the last known value", pencilled(causal=True))):
        print(f"{title}\n{show(table.schema, *cells, batch.valid)}\n")
    for causal in (False, True):
        print("causal" if causal else "both ways", "in window 1: a line a query, # = may look at this key")
        for line in create_attention_mask(batch.valid, causal)[1, 0].tolist():
            print("    " + " ".join("#" if may else "." for may in line))
