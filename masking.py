"""
What is hidden, what is pencilled in, and who may look at whom. Pure tensor functions, nothing of ours imported.

    python masking.py        # one tiny batch before and after hiding, pencilled in, and its attention masks, as text

A cell of the table can be unknown to the model for two reasons: the file has no value there (`~observed`), or we
took the value away to have something to ask for (`hidden`). The model is shown the same [MASK] for both, and only
the loss knows which is which: a cell that was never there has no right answer. What is neither is `known`:

    known = observed & ~hidden

Masks are bool and (B, T, F), numeric columns first. The words are defined once, at the top of model.py.
"""
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

UNK_ID = 1      # a category never seen in the train rows; id 0 is [MASK], a column's own values start at 2


class Inputs(NamedTuple):
    """What the model gets to see of a batch. A training script's objective fills it in."""
    numeric: torch.Tensor           # (B, T, N) float32, the values to show; read only where `shown`
    categorical: torch.Tensor       # (B, T, K) int64, the ids to show; read only where `shown`
    shown: torch.Tensor             # (B, T, F) bool, True = the embedding gets a value here and not [MASK]
    known: torch.Tensor             # (B, T, F) bool, True = this value is true; statistics come from these alone
    pencil: torch.Tensor            # (B, T, N) float32, the guess that the model starts from
    pencil_ids: torch.Tensor        # (B, T, K) int64, the same for categories; 0 = no known cell to guess from
    clock: torch.Tensor             # (B, T, C) float32
    attend: Optional[torch.Tensor]  # (B, 1, T, T) bool, True = query may look at key; None = nothing to mask


class Targets(NamedTuple):
    """What it is asked, cell by cell. Holds no NaN: what is not scored is 0 or any other finite number."""
    numeric: torch.Tensor           # (B, T, N) float32
    categorical: torch.Tensor       # (B, T, K) int64
    score: torch.Tensor             # (B, T, F) bool, True = this cell counts in the loss


# -----------------------------------------------------------------------------
# what is hidden

def last_true(mask):
    """For each cell the row of the last True at or before it in its column, -1 where there is none.
    mask: (B, T, F) bool. Returns (B, T, F) int64. Everything that looks back in time is built on this."""
    rows = torch.arange(mask.shape[1])[None, :, None]                           # (1, T, 1)
    return torch.where(mask, rows.to(mask.device), -1).cummax(dim=1).values


def scorable(observed, categorical):
    """Cells that have a right answer: (B, T, F) bool, True = observed, and not [UNK], which is no class of its own."""
    n_numeric = observed.shape[-1] - categorical.shape[-1]
    return observed & F.pad(categorical != UNK_ID, (n_numeric, 0), value=True)


def create_masks(observed, mask_prob, generator, style="cell", span=12):
    """Choose the cells to hide. Returns `hidden` (B, T, F) bool, True = taken away; never where `observed` is False.

    observed: (B, T, F) bool, True = there is a value to take away.
    mask_prob: float, or a tensor that broadcasts to (B, T, F), such as (B, 1, 1) for one rate a window.
    style "cell": each cell on its own. "span": runs of rows in a column, lengths geometric with mean `span`, at the
    same expected rate (Zerveas 2021, section 3.3), because real gaps are runs.
    Nothing hidden is a legal outcome. ValueError where spans that short cannot reach the rate.
    """
    u = torch.rand(observed.shape, generator=generator)                         # (B, T, F)
    if style == "cell":
        return observed & (u < mask_prob)
    # A two-state chain in each column: a hidden cell stays hidden with probability 1 - 1/span, and the chance `enter`
    # of a run to begin makes the long-run rate mask_prob. One draw decides: below `enter` hidden, above 1 - 1/span
    # not hidden, and between the two the cell does as the cell before it did.
    mask_prob = torch.as_tensor(mask_prob)
    enter = mask_prob / (1 - mask_prob) / span
    if (enter > 1 - 1 / span).any():
        raise ValueError(f"spans of mean length {span} cannot hide {float(mask_prob.max()):.2g} of the cells")
    start = torch.arange(observed.shape[1])[None, :, None] == 0                 # row 0 has no cell before it
    hidden = u < torch.where(start, mask_prob, enter)
    decided = hidden | (u >= 1 - 1 / span) | start
    return observed & hidden.gather(1, last_true(decided))


def bert_style_masking(numeric, categorical, observed, hidden, generator, mask_share=0.8, random_share=0.1):
    """Of the hidden cells show 80 % as [MASK], 10 % as another value of the same column, 10 % as they are (Devlin
    2019, section 3.1). All of them are scored: a model that cannot tell which cells were left alone has to keep
    an opinion about every cell.

    numeric (B, T, N) float32, categorical (B, T, K) int64, observed and hidden (B, T, F) bool.
    Returns numeric, categorical as shown, and `shown` (B, T, F) bool, True = a value and not [MASK].
    The other value is that of a known cell elsewhere in the batch, so it is never a special id, never a missing
    cell's 0; a column without one falls back to [MASK].
    """
    # ONE uniform number a cell: two independent draws (20 % not masked, half of those random) are the classic
    # way to get 81/10/9
    u = torch.rand(hidden.shape, generator=generator)                           # (B, T, F)
    n_numeric = numeric.shape[-1]
    donor = (scorable(observed, categorical) & ~hidden).flatten(0, 1)           # (B*T, F), True = may lend its value
    masked = hidden & (u < mask_share)
    random = hidden & ~masked & (u < mask_share + random_share)
    masked |= random & ~donor.any(dim=0)
    random &= donor.any(dim=0)

    # all donors in one list, column after column: a cell of column j draws from its column's stretch of the list
    donor_row = donor.T.nonzero()[:, 1]
    count = donor.sum(dim=0)                                                    # (F,)
    cell_row, column = random.flatten(0, 1).nonzero().unbind(1)
    v = torch.rand(len(column), generator=generator)
    pick = (count.cumsum(0) - count)[column] + (v * count[column]).long()       # v < 1, but v * count may round up:
    row = donor_row[torch.minimum(pick, count.cumsum(0)[column] - 1)]           # stay inside the column's stretch

    numeric, categorical = numeric.clone(), categorical.masked_fill(masked[..., n_numeric:], 0)
    for values, here, j in ((numeric, column < n_numeric, column),
                            (categorical, column >= n_numeric, column - n_numeric)):
        values = values.flatten(0, 1)                                           # (B*T, N or K), a view
        values[cell_row[here], j[here]] = values[row[here], j[here]]
    return numeric, categorical, observed & ~masked


def get_mask_probability(step, total_steps, start, end):
    """Progressive masking: linear from `start` at step 0 to `end` at the last step, total_steps - 1, both exactly;
    clamped outside, so that a resumed or prolonged run never leaves the range. Evaluation never uses it."""
    done = min(max(step / max(total_steps - 1, 1), 0.0), 1.0)
    return start * (1 - done) + end * done      # start + done * (end - start) would miss `end` by a rounding error


# -----------------------------------------------------------------------------
# what is pencilled in

def neighbours(known, causal):
    """For each cell the rows of the nearest known cells of its column: before (or at) it, and after (or at) it.
    known: (B, T, N) bool. Returns two (B, T, N) int64. Where one side has none it equals the other; where neither
    has, both are -1. Causal: the future has no neighbours."""
    T = known.shape[1]
    before = last_true(known)
    if causal:
        return before, before
    after = last_true(known.flip(1)).flip(1)                                    # counts rows from the end
    after = torch.where(after >= 0, T - 1 - after, -1)
    return torch.where(before >= 0, before, after), torch.where(after >= 0, after, before)


def pencil_in(numeric, known, causal):
    """What a person would pencil into an unknown cell. Returns (B, T, N) float32, equal to `numeric` where known.

    numeric: (B, T, N) float32; known: (B, T, N) bool, True = observed and not hidden: never a random or kept cell
    of 80/10/10, whose value the model must not be told apart from the truth.
    Both ways: linear interpolation between the nearest known cells of the column in the window, held at the ends.
    Causal: the last known value. No known cell: 0, the centre of the column's train rows.
    """
    before, after = neighbours(known, causal)
    left, right = (numeric.gather(1, rows.clamp(min=0)) for rows in (before, after))        # (B, T, N)
    rows = torch.arange(known.shape[1], device=known.device)[None, :, None]
    weight = (rows - before) / (after - before).clamp(min=1)                    # 0/1 where both are the same row
    return torch.where(before >= 0, left + weight * (right - left), 0.0)


def pencil_category(categorical, known, causal):
    """The same for ids (B, T, K), where nothing lies between two values: the nearest known one (the earlier where
    two are as near); causal: the last one. No known cell: 0."""
    before, after = neighbours(known, causal)
    rows = torch.arange(known.shape[1], device=known.device)[None, :, None]
    nearest = torch.where((rows - before).abs() <= (after - rows).abs(), before, after)
    return torch.where(nearest >= 0, categorical.gather(1, nearest.clamp(min=0)), 0)


# -----------------------------------------------------------------------------
# who may look

def padding_mask(valid):
    """(B, T) bool, True = a real row -> (B, 1, 1, T) bool, True = this key may be looked at. Only KEYS are masked:
    a query row masked whole has an empty softmax, which is a NaN one layer before anyone sees it."""
    return valid[:, None, None, :]


def causal_mask(T, device=None):
    """(1, 1, T, T) bool, True = query (row of the matrix) may look at key (column): itself and the past."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()[None, None]


def create_attention_mask(valid, causal):
    """(B, T) bool -> `attend` (B, 1, T, T) bool for F.scaled_dot_product_attention, True = may look. The diagonal is
    always allowed, so no softmax is ever empty. Rows full of [MASK] stay attendable: they hold a clock and a place."""
    T = valid.shape[1]
    attend = padding_mask(valid) & torch.ones(T, T, dtype=torch.bool, device=valid.device)  # (B, 1, T, T)
    if causal:
        attend = attend & causal_mask(T, valid.device)
    return attend | torch.eye(T, dtype=torch.bool, device=valid.device)


if __name__ == "__main__":
    from data import show, step_generator, tiny_batch       # for this demonstration only

    table, batch = tiny_batch()
    N, generator = len(table.schema.numeric), step_generator(3)
    hidden = create_masks(scorable(batch.observed, batch.categorical), 0.4, generator)
    numeric, categorical, shown = bert_style_masking(*batch[:3], hidden, generator)
    known = batch.observed & ~hidden
    for title, values, ids, present in (
            ("the batch: scaled values and ids, ? = missing in the file", batch.numeric, batch.categorical, batch.observed),
            ("known, what is left after hiding 40 %", batch.numeric, batch.categorical, known),
            ("shown, with 80/10/10: of the hidden cells some come back, as another cell's value or as they were",
             numeric, categorical, shown),
            ("pencilled in, both ways: between the nearest known cells", pencil_in(batch.numeric, known[..., :N], False),
             pencil_category(batch.categorical, known[..., N:], False), torch.ones_like(known)),
            ("pencilled in, causal: the last known value", pencil_in(batch.numeric, known[..., :N], True),
             pencil_category(batch.categorical, known[..., N:], True), torch.ones_like(known))):
        print(f"{title}\n{show(table.schema, values, ids, present, batch.valid)}\n")
    for causal in (False, True):
        print(f"who may look at whom in window 1, {'causal' if causal else 'both ways'}: a line a query, # = may look")
        for line in create_attention_mask(batch.valid, causal)[1, 0].tolist():
            print("    " + " ".join("#" if may else "." for may in line))
