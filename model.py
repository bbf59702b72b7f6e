"""
The transformer, its loss and its errors. One token is one row of the table.

    python model.py             # parameters by part, and one forward pass shape by shape
    python model.py --leaks     # which output rows depend on which input rows, found with autograd
    python model.py --bench     # milliseconds of a training step on this machine

The words, used everywhere:

    B    windows in a batch                     N    numeric columns
    T    time steps, rows of a window           K    categorical columns
    D    width of the residual stream           F    columns, N + K
    nh   heads                                  C    clock features, see data.make_clock
    hs   head size, D / nh
    V_k  ids of categorical column k: 0 = [MASK], 1 = [UNK], then its V_k - 2 own values, commonest first

    valid     (B, T)        True = a real row, False = padding
    observed  (B, T, F)     True = the table has a value here
    hidden    (B, T, F)     True = we took this value away, the model must guess it
    shown     (B, T, F)     True = the embedding gets a value here and not [MASK]
    known     (B, T, F)     True = observed and not hidden: guesses and statistics are made from these alone
    pencil    (B, T, N)     what a person would write into unknown cells: the guess that the model starts from
    score     (B, T, F)     True = this cell counts in the loss
    attend    (B, 1, T, T)  True = this query may look at this key
"""
import argparse
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

from masking import Inputs, Targets, create_inputs, create_masks, move, pencil_in

TRUST = 5.0     # lead of the pencilled-in category's logit before anything is learned


@dataclass
class Config:
    """The shape of a model."""
    n_numeric: int              # N
    vocab_sizes: list           # V_k of the K categorical columns, 3 at least
    n_clock: int = 0            # C
    seq_len: int = 96           # the longest T
    n_layer: int = 4
    n_head: int = 4             # nh
    n_embd: int = 128           # D
    dropout: float = 0.0
    causal: bool = False        # False: a row sees all rows of its window. True: itself and the past


# -----------------------------------------------------------------------------
# attention

def rotary_table(T, head_size, base=100.0):
    """cos and sin, each (T, hs/2), of the angle by which each pair of channels turns at each row (Su 2021).

    The base is 100, not the 10,000 of language models: a window is about a hundred rows, not thousands.
    """
    frequency = base ** (-torch.arange(0, head_size, 2) / head_size)            # (hs/2,)
    angle = torch.arange(T)[:, None] * frequency                                # (T, hs/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn pairs of channels of q and k, x (B, T, 2, nh, hs), by the angle of their row. A pair is a complex
    number; to turn it by a is to multiply it by e^ia = cos a + i sin a. In the product of a query and a key,
    Re(q e^ia conj(k e^ib)) = Re(q conj(k) e^i(a-b)): the distance of their rows is all that is left."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))             # (B, T, 2, nh, hs/2)
    turn = torch.complex(cos, sin)[:, None, None]                               # (T, 1, 1, hs/2)
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)              # x may be bfloat16


def plain_attention(q, k, v, attend=None):
    """softmax(q k^T / sqrt(hs)) v (Vaswani 2017).

    Each row has a query (what it looks for), a key (what it offers) and a value (what it hands over). It
    takes the mean of all values, weighted by the softmax of its query's product with every key. A sum of hs
    products has a spread of sqrt(hs); without the division one row would take all.
    q, k, v: (B, nh, T, hs); attend: broadcasts to (B, nh, T, T), True = may look. The model calls torch's
    fused kernel instead, which is tested against this.
    """
    weight = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])                   # (B, nh, T, T)
    if attend is not None:
        weight = weight.masked_fill(~attend, float("-inf"))
    return weight.softmax(dim=-1) @ v                                           # (B, nh, T, hs)


class SelfAttention(nn.Module):
    """Multi-head attention over the rows of a window."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout, self.causal = config.n_head, config.dropout, config.causal
        # no biases in a block: LayerNorm has its own, and these would cost a CPU 4 % of a step
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, attend, cos, sin):
        B, T, D = x.shape
        qk, v = self.qkv(x).view(B, T, 3, self.n_head, D // self.n_head).split([2, 1], dim=2)
        q, k, v = *rotate(qk, cos, sin).unbind(dim=2), v.squeeze(2)             # (B, T, nh, hs) each
        # heads before rows: given (B, T, nh, hs) the kernel would attend over the heads, without complaint
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))                        # (B, nh, T, hs)
        # fused softmax(q k^T) v that never holds the T x T weights (Dao 2022); dropout only while training;
        # a mask or is_causal, never both: create_inputs gives a causal model no mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, is_causal=self.causal,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))                    # (B, T, D)


class MLP(nn.Module):
    """Attention moves things between rows; this works on each row alone, with most of a block's weights."""

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)       # 4: since Vaswani 2017
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x)))                                    # (B, T, D)


class Block(nn.Module):
    """Pre-norm: the residual stream itself is never normalised, so gradients pass through it untouched."""

    def __init__(self, config):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(config.n_embd), SelfAttention(config)
        self.norm2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)
        self.drop = nn.Dropout(config.dropout)          # of what is added to the stream

    def forward(self, x, attend, cos, sin):
        x = x + self.drop(self.attn(self.norm1(x), attend, cos, sin))
        return x + self.drop(self.mlp(self.norm2(x)))


# -----------------------------------------------------------------------------
# from cells to rows and back

class RowEmbedding(nn.Module):
    """A row is the sum of its cells and of its clock.

    A number is its value times a vector of its column, plus its step from the row before times another (four
    times the step, which is small beside the value and must not drown in it). A category is the vector of its
    id. Where a cell is not shown, what is pencilled in stands in for it, plus a [MASK] vector of the column
    that says so. Missing in the file and hidden by us look the same here; only the loss knows.
    """

    def __init__(self, config):
        super().__init__()
        N, K, C = config.n_numeric, len(config.vocab_sizes), config.n_clock
        self.weight = nn.Parameter(torch.empty(2 * N + (N + K) + C, config.n_embd))     # see x, below
        self.bias = nn.Parameter(torch.zeros(config.n_embd))                        # of all columns
        # One table for all categorical columns, one after the other. Its row 0 is [UNK] of every column, and
        # padding_idx keeps it zero: a value never seen in training has taught us nothing.
        offset = torch.tensor([1] + config.vocab_sizes).cumsum(0)[:-1]              # (K,)
        self.register_buffer("offset", offset, persistent=False)
        self.categories = nn.Embedding(1 + sum(config.vocab_sizes), config.n_embd, padding_idx=0)

    def forward(self, values, ids, shown, clock):
        # values (B, T, N), ids (B, T, K), shown (B, T, F), clock (B, T, C)
        steps = 4 * F.pad(values.diff(dim=1), (0, 0, 1, 0))                     # (B, T, N), the first is 0
        # all that is a number goes through one matrix product, and what is not shown says so with a 1
        x = torch.cat((values, steps, (~shown).type_as(values), clock), dim=-1)         # (B, T, 2N + F + C)
        rows = torch.where(ids == 1, 0, ids + self.offset)                      # (B, T, K), of the one table
        return x @ self.weight + self.bias + self.categories(rows).sum(dim=2)   # (B, T, D)


def window_scale(numeric, known):
    """Level and spread of each column in each window, from known cells alone (Kim 2022).

    numeric (B, T, N), known (B, T, N) bool, True = known. Returns center and scale, (B, 1, N).
    The spread counts one cell more than there are, at distance 1, a column's spread over all train rows. So a
    window without spread is not blown up by dividing through almost nothing, and one without a known cell has
    center 0 and scale 1.
    """
    # sums with a mask, not means of selected cells: windows know different numbers of cells
    count = known.sum(dim=1, keepdim=True)                                      # (B, 1, N)
    center = torch.where(known, numeric, 0.0).sum(dim=1, keepdim=True) / count.clamp(min=1)
    square = torch.where(known, numeric - center, 0.0).square().sum(dim=1, keepdim=True)
    return center, ((square + 1) / (count + 1)).sqrt()


class Guess(NamedTuple):
    """What the model says of each cell."""
    numeric: torch.Tensor       # (B, T, N) float32
    logits: list                # K of (B, T, V_k - 2) float32

    def ids(self):
        """The likeliest id of each categorical cell, (B, T, K) int64."""
        nothing = torch.zeros_like(self.numeric[..., :0], dtype=torch.long)     # where K is 0
        return torch.cat([nothing, *(x.argmax(dim=-1, keepdim=True) + 2 for x in self.logits)], dim=-1)


class TableTransformer(nn.Module):
    """masking.Inputs -> Guess.

    The heads predict the correction to what is pencilled in and start at zero: before its first step the
    model IS linear interpolation and the nearest known category (or, causal, repetition of the last row), and
    training is judged against that.
    """

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head or config.n_embd // config.n_head % 2:
            raise ValueError(f"n_embd {config.n_embd} must be n_head {config.n_head} times an even number")
        self.config = config
        self.classes = [v - 2 for v in config.vocab_sizes]                      # the column's own values
        self.embed = RowEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.n_numeric + sum(self.classes))      # all columns' heads
        cos, sin = rotary_table(config.seq_len, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:    # "proj" adds to the stream, 2 n_layer times: smaller, to keep its size
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "proj" in name else 0.02)
        for zero in (self.head.weight, self.head.bias, self.embed.categories.weight[0]):        # last: [UNK]
            nn.init.zeros_(zero)

    def features(self, inputs):
        """Inputs -> what the model makes of each row, the residual stream after the last norm, (B, T, D); and
        the spread of each column in the window, (B, 1, N), or 1.0 where the future must not be known."""
        numeric, ids, shown, known, pencil, pencil_ids, clock, attend = inputs
        T, N = numeric.shape[1:]
        # the level and spread of the window would tell a causal model about its future
        center, scale = (0.0, 1.0) if self.config.causal else window_scale(numeric, known[..., :N])
        values = (torch.where(shown[..., :N], numeric, pencil) - center) / scale                # (B, T, N)
        x = self.embed(values, torch.where(shown[..., N:], ids, pencil_ids), shown, clock)      # (B, T, D)
        for block in self.blocks:
            x = block(x, attend, self.cos[:T], self.sin[:T])
        return self.norm(x), scale

    def forward(self, inputs):
        x, scale = self.features(inputs)
        # one product for the heads of all columns, then a slice for each; from here on in float32
        out = self.head(x).float()                                              # (B, T, N + all classes)
        correction, *logits = out.split([self.config.n_numeric] + self.classes, dim=-1)
        for k, n in enumerate(self.classes):
            ids = torch.arange(2, 2 + n, device=out.device)                     # (n,), the column's own
            logits[k] = logits[k] + TRUST * (inputs.pencil_ids[..., k:k + 1] == ids)            # (B, T, n)
        return Guess(inputs.pencil + scale * correction, logits)

    @torch.no_grad()
    def predict(self, inputs):
        """Inputs -> numbers (B, T, N) and the likeliest ids (B, T, K), on the CPU."""
        guess = self(move(inputs, self.cos.device))
        return guess.numeric.cpu(), guess.ids().cpu()

    def rollout(self, batch, clock, steps, predict=None):
        """Say what comes next, write it down, and go on from there, looking at the last T rows at most.

        batch: data.Batch of histories, as long as `valid` says, a row at least; clock (B, steps, C): that of
        the rows to come; predict: Inputs -> (numbers, ids), where it is not this model that is asked.
        Returns the Batch of the rows to come, (B, steps, ...). What has no value in a history gets none.
        """
        B, _, N = batch.numeric.shape
        each = torch.arange(B)[:, None]                                         # (B, 1)
        length = batch.valid.sum(dim=1, keepdim=True)                           # (B, 1)
        ever = batch.observed.any(dim=1, keepdim=True)                          # (B, 1, F)
        # room for what is to come, at the right end of each
        whole = type(batch)(*(torch.cat([x, x.new_zeros(B, steps, *x.shape[2:])], dim=1) for x in batch))
        future = length + torch.arange(steps)                                   # (B, steps)
        whole.clock[each, future] = clock
        for end in future.split(1, dim=1):                                  # (B, 1), where a row is due
            # the T rows before it, or fewer where the longest history has fewer
            size = min(int(end.max()), self.config.seq_len)
            start = (end - size).clamp(min=0)
            window = type(batch)(*(x[each, start + torch.arange(size)] for x in whole))
            # the whole window is run again for each row: no cache of keys and values, to stay readable
            numeric, ids = (predict or self.predict)(create_inputs(window, window.observed, causal=True))
            whole.numeric[each, end] = numeric[each, end - start - 1] * ever[..., :N]
            whole.categorical[each, end] = ids[each, end - start - 1] * ever[..., N:]
            whole.observed[each, end], whole.valid[each, end] = ever, True      # counts as seen now
        return type(batch)(*(x[each, future] for x in whole))


# -----------------------------------------------------------------------------
# loss

def count_scored(targets):
    """masking.Targets -> (2,) float32: how many numeric and how many categorical cells are scored."""
    N = targets.numeric.shape[-1]
    return torch.stack([targets.score[..., :N].sum(), targets.score[..., N:].sum()]).float()


def sum_losses(guess, targets, unit, loss="mse"):
    """Sums over scored cells, (2,) float32: squared or Huber errors of numbers, cross-entropy of categories.

    guess: Guess; targets: masking.Targets; loss: "mse" or "huber". unit (N,): what an error of 1 is in each
    column. In units of the pencil's own error a calm column weighs as much as a wild one.
    Sums, so that the caller divides once, by the count of a whole step clamped to 1: the mean of no cells is
    0/0. Targets hold no NaN, so torch.where is safe: what it drops has gradient 0; a dropped NaN has NaN.
    """
    N = targets.numeric.shape[-1]                                               # numeric columns come first
    measure = F.mse_loss if loss == "mse" else F.huber_loss
    error = measure(guess.numeric / unit, targets.numeric / unit, reduction="none")       # (B, T, N)
    total = torch.where(targets.score[..., :N], error, 0.0).sum()
    entropy = total.new_zeros(())
    for k, logits in enumerate(guess.logits):
        target = (targets.categorical[..., k] - 2).clamp(min=0)                 # unscored: any class will do
        nll = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")                     # (B, T)
        entropy = entropy + torch.where(targets.score[..., N + k], nll, 0.0).sum()
    return torch.stack([total, entropy])


# -----------------------------------------------------------------------------
# errors, scaled, and a line a column in units of the table: sums first, means at the end

def tally(errors, name, numeric, ids, targets, dim):
    """Add what a method got wrong to errors[name], (2, ..., F), summed over `dim` of (B, T, F): absolute and
    squared errors, a wrong category counting 1."""
    error = torch.cat([numeric - targets.numeric, ids != targets.categorical], dim=-1)  # a category: 0 or 1
    error = torch.where(targets.score, error, 0.0).cpu().double()               # (B, T, F)
    # sums, not means of batches: the last batch is smaller, and columns differ in holes
    errors[name] = errors.get(name, 0.0) + torch.stack([error.abs().sum(dim), error.square().sum(dim)])


def within_clip(targets, clip):
    """Targets without the cells beyond the clip, which are no longer the truth; and how many there were."""
    # padded with False: categories are never beyond it
    outside = targets.score & F.pad(targets.numeric.abs() >= clip, (0, targets.categorical.shape[-1]))
    return targets._replace(score=targets.score & ~outside), int(outside.sum())


def judge(errors, cells, schema, numeric=None):
    """What `tally` summed, errors {method: (2, cases, F)}, and cells (cases, F), how many were scored ->
    {method: {"mse", "mae", "accuracy": the mean of each case}}, None where nothing was scored; of the
    numeric columns only those listed in `numeric`, if any."""
    N = len(schema.numeric)                     # before it columns are numbers, from it on categories
    def mean(sums, columns):                    # over cells: a column full of holes counts for less
        sums, counts = sums[:, columns].sum(1).tolist(), cells[:, columns].sum(1).tolist()
        return [s / c if c else None for s, c in zip(sums, counts)]
    numeric = numeric or slice(N)
    return {name: {"mse": mean(square, numeric), "mae": mean(absolute, numeric),
                   "accuracy": mean(cells - square, slice(N, None))}
            for name, (absolute, square) in errors.items()}


def print_table(title, cases, results, measure):
    """A line a method: its means in `cases`, {heading: index}, and, where there are several, over all."""
    several = len(results["model"][measure]) > 1                # the mean of one case says nothing new
    if any(value is not None for value in results["model"][measure]):           # no categories, no table
        print(f"\n{title:<32}" + "".join(f"{case:>11}" for case in [*cases] + ["mean"] * several))
        for name, means in results.items():
            there = [value for value in means[measure] if value is not None]
            values = [means[measure][i] for i in cases.values()] + [sum(there) / len(there)] * several
            print(f"{name:<32}" + "".join(f"{'-' if v is None else format(v, '.4g'):>11}" for v in values))


def print_columns(errors, cells, schema):
    """A line a column: its mean absolute error in its own units, over all cases; of a category, which has no
    distance to the truth, the share that is wrong. Returns {column: {method: that error}}."""
    print(f"\n{'mean absolute error, own units':<32}" + "".join(f"{name:>11}" for name in errors))
    means, scales = {}, schema.scale + [1.0] * len(schema.categorical)
    for j, (name, scale) in enumerate(zip(schema.numeric + schema.categorical, scales)):
        count = cells[:, j].sum() or math.nan                                   # nan: nothing was scored
        means[name] = {method: float(e[0, :, j].sum() / count) * scale for method, e in errors.items()}
        if count > 0:
            name, values = name + " (share wrong)" * (j >= len(schema.numeric)), means[name].values()
            print(f"{name:<32}" + "".join(f"{value:>11.4g}" for value in values))
    return means


# -----------------------------------------------------------------------------
# where a NaN came from

def first_non_finite(model, inputs):
    """The name of the first module whose output for these Inputs is not all finite, or None."""
    names, found = {module: name for name, module in model.named_modules()}, []

    def look(module, given, output):
        parts = [output] if isinstance(output, torch.Tensor) else [output.numeric, *output.logits]
        if not all(x.isfinite().all() for x in parts):
            found.append(names[module] or "the heads' sum with the pencil")
    # a hook on all modules, for this one call; it runs when a module's output is there, so those inside it
    # report before it does
    with torch.no_grad(), nn.modules.module.register_module_forward_hook(look):
        model(inputs)
    return found[0] if found else None


def explain(model, micro, windows, table, unit, loss, autocast):
    """Where a non-finite gradient may come from: lines for stderr. micro: (Inputs, Targets) of each forward
    pass of the step; windows: the (B, 2) rows that each was cut from, as in Table.sample."""
    # what went in, most often the reason: the three columns with the largest numbers, and the row of each
    numeric = torch.cat([inputs.numeric for inputs, _ in micro]).flatten(0, 1)              # (B*T, N)
    size = torch.where(numeric.isfinite(), numeric.abs(), math.inf)
    for j in size.amax(dim=0).argsort(descending=True)[:3].tolist():
        window, t = divmod(int(size[:, j].argmax()), table.seq_len)
        row, name = int(torch.cat(windows)[window, 0]) + t, table.schema.numeric[j]
        yield f"{name}: up to {size[:, j].max():.3g} scaled, in row {row} of the sorted table"
    model.zero_grad()                                   # clipping has spread the NaN: the batch once more
    for inputs, targets in micro:
        with autocast:
            guess = model(inputs)
        sum_losses(guess, targets, unit, loss).sum().backward()
    lost = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    yield f"gradients of this batch not finite: {', '.join(lost[:3]) or 'none'} ({len(lost)} parameters)"
    # what came out of which module: the first in the order of the forward pass
    with autocast:
        first = [first_non_finite(model, inputs) for inputs, _ in micro]
    yield f"first output not finite: {next(filter(None, first), 'none, so it is the loss or the way back')}"
    yield "look at these rows; try a lower --lr or --clip, more --warmup_steps, --dtype float32; --resume"


# -----------------------------------------------------------------------------
# what this file prints when run by itself

def print_shapes():
    """Parameters by part, and one forward pass over the tiny table, shape by shape."""
    from data import step_generator, tiny_batch             # for this demonstration only

    table, batch = tiny_batch()
    schema = table.schema
    model = TableTransformer(Config(len(schema.numeric), schema.vocab_sizes(), 0, table.seq_len))
    for name, part in model.named_children():
        print(f"{name:<8}{sum(p.numel() for p in part.parameters()):>9,} parameters")
    known = batch.observed & ~create_masks(batch.observed, 0.3, step_generator(2))
    inputs = create_inputs(batch, known, causal=False)
    for name, x in inputs._asdict().items():
        print(f"inputs.{name:<15}{tuple(x.shape)}")
    for name, part in model.named_modules():
        if name.startswith(("embed", "blocks.0", "norm", "head")):              # other blocks look alike
            part.register_forward_hook(lambda part, x, y, name=name: print(f"{name:<22}{tuple(y.shape)}"))
    with torch.no_grad():
        guess = model(inputs)
    print(f"{'guess.numeric':<22}{tuple(guess.numeric.shape)}")
    print(f"{'guess.logits':<22}{[tuple(x.shape) for x in guess.logits]}")
    print(f"untrained, the guess is what is pencilled in: {torch.equal(guess.numeric, inputs.pencil)}")
    targets, unit = Targets(batch.numeric, batch.categorical, batch.observed & ~known), torch.ones(2)
    # one hidden number, all the way to the loss
    b, t, j = targets.score[..., :2].nonzero()[0].tolist()
    truth, said = float(batch.numeric[b, t, j]), float(guess.numeric[b, t, j])
    print(f"{schema.numeric[j]} in window {b}, row {t}, is hidden: truth {truth:.2f}, guess {said:.2f}, "
          f"squared error {(truth - said) ** 2:.3f}")
    sums, counts = sum_losses(guess, targets, unit), count_scored(targets)
    print("losses, sums over hidden cells / counts: numeric {:.3f} / {:.0f}, categorical {:.3f} / {:.0f}"
          .format(sums[0], counts[0], sums[1], counts[1]))


def over_heads(q, k, v, attend=F.scaled_dot_product_attention, **options):
    """The mistake: SDPA on (B, T, nh, hs). Each row attends over its own heads, and nothing complains."""
    return attend(*(z.transpose(1, 2) for z in (q, k, v)), **options).transpose(1, 2)


def find_leaks(causal, wrong_axis=False, T=12, N=3):
    """(T, T) bool, True = the output row (line) depends on the input row (column), by autograd through pencil
    and model, every fourth cell hidden. AssertionError if the truth under a hidden cell reaches an output."""
    torch.manual_seed(0)
    model = TableTransformer(Config(N, [], 0, T, n_embd=32, causal=causal))
    nn.init.normal_(model.head.weight)                      # a head of zeros would hide the network
    numeric, ids = torch.randn(1, T, N, requires_grad=True), torch.zeros(1, T, 0, dtype=torch.long)
    known = torch.arange(T * N).view(1, T, N) % 4 > 0
    pencil, clock = pencil_in(numeric, known, causal), torch.zeros(1, T, 0)
    with mock.patch.object(F, "scaled_dot_product_attention", over_heads) if wrong_axis else nullcontext():
        guess = model(Inputs(numeric, ids, known, known, pencil, ids, clock, attend=None))
    lines = []
    for row in guess.numeric[0]:                            # (N,)
        gradient, = torch.autograd.grad(row.sum(), numeric, retain_graph=True)
        assert (gradient[~known] == 0).all(), "a hidden value reaches an output"
        lines.append((gradient[0] != 0).any(dim=-1))
    return torch.stack(lines)


def bench(compiled, repeats=15):
    """Time of a training step, and its share of the speed of a plain matrix product in the same dtype."""
    device, N = "cuda" if torch.cuda.is_available() else "cpu", 7

    def median(work):
        times = []
        for _ in range(repeats + 3):                        # the first three warm up
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()                    # a GPU is told what to do, and does it later
            times.append(time.perf_counter() - start)
        return sorted(times[3:])[repeats // 2]              # a mean would count the neighbours' work as ours

    shapes = [(96, 32, 128, 4, 4), (256, 16, 384, 6, 6), (1024, 14, 128, 4, 4)]
    shapes += [(1024, 32, 512, 8, 4)] * (device == "cuda")  # the others leave a GPU waiting for Python
    for dtype in [torch.float32, torch.bfloat16] + [torch.float16] * (device == "cuda"):
        a = torch.randn(*[8192 if device == "cuda" else 2048] * 2, device=device, dtype=dtype)
        # what this device does at best, in this process and at this moment
        peak = 2 * len(a) ** 3 / median(lambda: a @ a)      # FLOP/s
        for T, B, D, n_layer, n_head in shapes:
            raw = TableTransformer(Config(N, [], 4, T, n_layer, n_head, D)).to(device)
            model = torch.compile(raw) if compiled else raw
            optimizer = torch.optim.AdamW(raw.parameters(), fused=True)
            x, known = torch.randn(B, T, N, device=device), torch.rand(B, T, N, device=device) > 0.3
            ids = torch.zeros(B, T, 0, dtype=torch.long, device=device)         # no categories
            inputs = Inputs(x, ids, known, known, x, ids, torch.zeros(B, T, 4, device=device), None)

            def step():
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    guess = model(inputs)
                F.mse_loss(guess.numeric, x + 1).backward()
                nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took = median(step)
            # 6 operations a parameter and token, and attention's two T x T products, as nanoGPT counts them
            flops = B * T * (6 * sum(p.numel() for p in raw.parameters()) + 12 * n_layer * D * T) / took
            memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device == "cuda" else ""
            print(f"T {T:4d}, B {B:2d}, D {D:3d}, {str(dtype)[6:]:<8} {took * 1e3:7.1f} ms a step, "
                  f"{B * T * N / took:10,.0f} cells/s, {flops / 1e9:7,.0f} GFLOP/s, {flops / peak:.2f} matmul"
                  f"{memory}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaks", action="store_true", help="who depends on whom, as a picture in text")
    parser.add_argument("--bench", action="store_true", help="how long a training step takes")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    args = parser.parse_args()
    if args.bench:
        bench(args.compile)
    elif args.leaks:
        print("a line an output row, # = it depends on this input row")
        print("".join(f"{title:<30}" for title in ("both ways", "causal", "causal, over the wrong axis")))
        pictures = find_leaks(False), find_leaks(True), find_leaks(True, wrong_axis=True)
        for lines in zip(*(picture.tolist() for picture in pictures)):
            print("".join(f"{' '.join('.#'[depends] for depends in line):<30}" for line in lines).rstrip())
        print("what is left of the third comes from the pencil and from the step to the row before")
    else:
        print_shapes()
