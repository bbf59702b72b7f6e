"""
The transformer and its loss. One token is one row of the table.

    python model.py             # parameters by part, one forward pass shape by shape, one cell to its loss
    python model.py --leaks     # which output rows depend on which input rows, found with autograd
    python model.py --bench     # milliseconds of a training step on this machine

    B    windows in a batch                     N    numeric columns
    T    time steps, rows of a window           K    categorical columns
    D    width of the residual stream           F    columns, N + K
    nh   heads                                  C    clock features, see data.time_features
    hs   head size, D / nh
    V_k  ids of categorical column k: 0 = [MASK], 1 = [UNK], then its V_k - 2 own values, commonest first

    valid     (B, T)        True = a real row, False = padding
    observed  (B, T, F)     True = the table has a value here
    hidden    (B, T, F)     True = we took this value away, the model must guess it
    known     (B, T, F)     True = observed and not hidden: the base and all statistics come from these alone
    base      (B, T, N)     the guess that the model starts from and corrects
    score     (B, T, F)     True = this cell counts in the loss
    attend    (B, 1, T, T)  True = this query may look at this key
"""
import argparse
import math
import time
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Batch, step_generator, tiny_batch
from masking import Targets, create_inputs, create_masks, move

PRIOR_LOGIT = 5.0       # lead of the base's category before anything is learned


@dataclass
class Config:
    n_numeric: int              # N
    vocab_sizes: list           # V_k of the K categorical columns
    n_clock: int = 0            # C
    seq_len: int = 96           # the longest T
    n_layer: int = 4
    n_head: int = 4             # nh
    n_embd: int = 128           # D
    dropout: float = 0.0
    clip: float = 10.0          # numbers enter the network clipped to +- this
    closed_base: bool = False   # the base is the closed form, not the straight line or the last value
    causal: bool = False        # False: a row sees all rows of its window. True: itself and the past


# -----------------------------------------------------------------------------
# the transformer

def apply_rotary(x, rotary):
    """Turn pairs of channels of q or k (B, nh, T, hs) by an angle that grows with the row (Su 2021): in a
    product of the two only the difference of their angles is left, the distance of their rows."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))             # (B, nh, T, hs/2)
    turned = torch.view_as_real(pairs * rotary)                                 # (B, nh, T, hs/2, 2)
    return turned.flatten(-2).type_as(x)                                        # x may be bfloat16


def plain_attention(q, k, v, attend=None):
    """softmax(q k^T / sqrt(hs)) v (Vaswani 2017): each row takes the mean of all values (B, nh, T, hs),
    weighted by how well its query fits their keys. torch's fused kernel, used below, is tested against
    this."""
    weight = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])                   # (B, nh, T, T)
    if attend is not None:
        weight = weight.masked_fill(~attend, float("-inf"))
    return weight.softmax(dim=-1) @ v                                           # (B, nh, T, hs)


class SelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.causal = config.causal
        # no biases in a block: LayerNorm has its own, and these would cost a CPU 4 % of a step
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, attend, rotary):
        B, T, D = x.shape
        q, k, v = self.qkv(x).split(D, dim=2)                                   # (B, T, D) each
        # heads before rows: given (B, T, nh, hs) the kernel would attend over the heads, without complaint
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)                       # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)
        q = apply_rotary(q, rotary)
        k = apply_rotary(k, rotary)
        # fused, without the (T, T) weights (Dao 2022); a mask or is_causal, never both
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attend, dropout, self.causal)
        y = y.transpose(1, 2).reshape(B, T, D)
        return self.proj(y)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x)))                                    # (B, T, D)


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd)
        self.attn = SelfAttention(config)               # moves things between rows
        self.norm2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)                          # works on each row alone
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, attend, rotary):
        # pre-norm: the stream itself is never normalised, so gradients pass through it untouched
        x = x + self.drop(self.attn(self.norm1(x), attend, rotary))
        x = x + self.drop(self.mlp(self.norm2(x)))
        return x


class RowEmbedding(nn.Module):
    """A row is the sum of its cells and its clock. A number is its value times a vector of its column, plus
    its step from the row before times another; a category is the vector of its id. Where nothing is known the
    base stands in, and the [MASK] vector of the column says so."""

    def __init__(self, config):
        super().__init__()
        n_columns = config.n_numeric + len(config.vocab_sizes)
        self.numbers = nn.Linear(2 * config.n_numeric + n_columns + config.n_clock, config.n_embd)
        # padding_idx keeps [UNK] at zero: a value never seen in training has taught us nothing
        self.categories = nn.ModuleList(
            nn.Embedding(size, config.n_embd, padding_idx=1) for size in config.vocab_sizes)

    def forward(self, values, steps, ids, known, clock):
        masked = (~known).type_as(values)                                       # (B, T, F)
        # 4: a step is small beside its value, and must not drown in it
        x = torch.cat([values, 4 * steps, masked, clock], dim=-1)               # (B, T, 2N + F + C)
        x = self.numbers(x)                                                     # (B, T, D)
        for k, embedding in enumerate(self.categories):
            x = x + embedding(ids[..., k])
        return x


def window_scale(numeric, known):
    """Level and spread of each column in each window, from known cells alone (Kim 2022), two (B, 1, N). The
    spread counts one cell more than there are, at distance 1, the spread of the train rows: a constant window
    is not blown up, and one without known cells gets 0 and 1."""
    count = known.sum(dim=1, keepdim=True)                                      # (B, 1, N)
    center = torch.where(known, numeric, 0.0).sum(dim=1, keepdim=True) / count.clamp(min=1)
    square = torch.where(known, numeric - center, 0.0).square()                 # (B, T, N)
    scale = (square.sum(dim=1, keepdim=True) + 1) / (count + 1)
    return center, scale.sqrt()


class Prediction(NamedTuple):
    """What the model says of each cell."""
    numeric: torch.Tensor       # (B, T, N) float32
    logits: list                # K of (B, T, V_k - 2) float32, of the column's own values

    def ids(self):
        """The likeliest id of each categorical cell, (B, T, K) int64."""
        ids = [logits.argmax(dim=-1, keepdim=True) + 2 for logits in self.logits]
        return torch.cat([self.numeric[..., :0].long(), *ids], dim=-1)          # K may be 0


class TableTransformer(nn.Module):
    """masking.Inputs -> Prediction. The heads correct the base and start at zero: before its first step the
    model IS its base (a closed form, a straight line, the last row), and training is judged against that."""

    def __init__(self, config, closed_form=None):
        super().__init__()
        self.config = config
        self.closed_form = closed_form          # stays on the CPU, where create_inputs needs it
        self.embed = RowEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.numeric_head = nn.Linear(config.n_embd, config.n_numeric)
        self.class_heads = nn.ModuleList(nn.Linear(config.n_embd, size - 2) for size in config.vocab_sizes)
        hs = config.n_embd // config.n_head
        # base 100, not the 10,000 of language models: a window is about a hundred rows, not thousands
        frequency = 100.0 ** (-torch.arange(0, hs, 2) / hs)                     # (hs/2,)
        angle = torch.arange(config.seq_len)[:, None] * frequency               # (T, hs/2)
        self.register_buffer("rotary", torch.polar(torch.ones_like(angle), angle), persistent=False)
        for name, p in self.named_parameters():
            if "head" in name or name == "embed.numbers.bias":
                nn.init.zeros_(p)
            elif "proj" in name:        # adds to the stream, 2 n_layer times: smaller, to keep its size
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        for embedding in self.embed.categories:
            nn.init.zeros_(embedding.weight[1])

    def forward(self, inputs):
        T, N = inputs.numeric.shape[1:]
        center, scale = 0.0, 1.0
        if not self.config.causal:      # the level of the window would tell a causal model about its future
            center, scale = window_scale(inputs.numeric, inputs.known[..., :N])
        values = (inputs.numeric - center) / scale                              # (B, T, N)
        steps = F.pad(values.diff(dim=1), (0, 0, 1, 0))                         # the first is 0
        if self.config.causal and self.config.closed_base:
            # the step that the base takes, and the level above the mean so far: absolute levels are learnt by heart
            steps = inputs.base - inputs.numeric
            count = torch.arange(1, T + 1, device=values.device)[:, None]
            values = inputs.numeric - inputs.numeric.cumsum(dim=1) / count
        x = self.embed(self.clip(values), self.clip(steps), inputs.categorical, inputs.known, inputs.clock)
        for block in self.blocks:
            x = block(x, inputs.attend, self.rotary[:T])
        x = self.norm(x)
        if inputs.deviation is not None:
            scale = inputs.deviation
        numeric = inputs.base + scale * self.numeric_head(x).float()            # (B, T, N)
        logits = []
        for k, head in enumerate(self.class_heads):
            own = torch.arange(2, 2 + head.out_features, device=x.device)       # ids, (V_k - 2,)
            lead = PRIOR_LOGIT * (inputs.base_ids[..., k:k + 1] == own)         # (B, T, V_k - 2)
            logits.append(head(x).float() + lead)
        return Prediction(numeric, logits)

    def clip(self, values):
        return values.clamp(-self.config.clip, self.config.clip)

    def base_form(self):
        """The closed form, if it is the base that the heads correct."""
        return self.closed_form if self.config.closed_base else None

    @torch.no_grad()
    def predict(self, batch):
        """data.Batch, `observed` = what is known -> numbers (B, T, N) and likeliest ids (B, T, K), on the
        CPU."""
        inputs = create_inputs(batch, self.config.causal, self.base_form())
        prediction = self(move(inputs, self.rotary.device))
        return prediction.numeric.cpu(), prediction.ids().cpu()

    def rollout(self, batch, clock, predict=None):
        """Say what comes next, append it, and go on from there, looking at the last T rows at most.

        batch: histories of equal length; clock (B, steps, C): of the rows to come; predict: Batch ->
        (numbers, ids), else the model's. Returns the Batch of the rows to come. A column without any value
        gets none. """
        predict = predict or self.predict
        N = batch.numeric.shape[-1]
        ever = batch.observed.any(dim=1, keepdim=True)                          # (B, 1, F)
        for now in clock.split(1, dim=1):                                       # (B, 1, C)
            # the whole window is run again for each row: no cache of keys and values, to stay readable
            numeric, ids = predict(batch.rows(-self.config.seq_len, None))
            row = Batch(numeric=numeric[:, -1:] * ever[..., :N], categorical=ids[:, -1:] * ever[..., N:],
                        observed=ever, valid=batch.valid[:, -1:], clock=now, time=batch.time[:, -1:] + 1)
            batch = Batch._make(torch.cat(pair, dim=1) for pair in zip(batch, row))
        return batch.rows(-clock.shape[1], None)


# -----------------------------------------------------------------------------
# the loss

def count_scored(targets):
    """masking.Targets -> (2,) float32: how many numeric and how many categorical cells are scored."""
    N = targets.numeric.shape[-1]
    count = targets.score.sum(dim=(0, 1))                                       # (F,)
    return torch.stack([count[:N].sum(), count[N:].sum()]).float()


def sum_losses(prediction, targets, base_rmse, loss="mse"):
    """Sums over scored cells, (2,) float32: squared or Huber errors of numbers, cross-entropy of categories.

    base_rmse (N,): the base's own error in each column; in these units a calm column weighs as much as a wild
    one. Sums, so that the caller divides once, by the count of a whole step clamped to 1: the mean of no
    cells is 0/0. """
    N = targets.numeric.shape[-1]
    measure = {"mse": F.mse_loss, "huber": F.huber_loss}[loss]
    error = measure(prediction.numeric / base_rmse, targets.numeric / base_rmse, reduction="none")
    # Targets hold no NaN, so torch.where is safe: what it drops has gradient 0; a dropped NaN has NaN
    numeric = torch.where(targets.score[..., :N], error, 0.0).sum()
    categorical = numeric.new_zeros(())
    for k, logits in enumerate(prediction.logits):
        target = (targets.categorical[..., k] - 2).clamp(min=0)                 # unscored: any class will do
        error = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")       # (B, T)
        categorical = categorical + torch.where(targets.score[..., N + k], error, 0.0).sum()
    return torch.stack([numeric, categorical])


# ---- the rest can be skipped at first reading

def explain_non_finite(model, examples, windows, names):
    """Where a non-finite gradient may come from, in lines. examples: (shown, Inputs, Targets) of each forward
    pass of the step; windows: the rows that each was cut from, as in Table.sample; names: of the numeric
    columns."""
    for (_, inputs, _), rows in zip(examples, windows):
        known = torch.where(inputs.known[..., :len(names)], inputs.numeric, 0.0)                # (B, T, N)
        size = torch.where(known.isfinite(), known.abs(), math.inf)
        for j in size.amax(dim=(0, 1)).argsort(descending=True)[:3].tolist():
            b, t = divmod(int(size[..., j].argmax()), size.shape[1])
            row = int(rows[b, 0]) + t
            yield f"{names[j]}: up to {size[b, t, j]:.3g} scaled, in row {row} of the sorted table"
    lost = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
    yield f"gradients not finite: {', '.join(lost[:3])} ({len(lost)} parameters)"
    yield "look at these rows; try a lower --lr or --clip, more --warmup_steps, --dtype float32; --resume"


def random_batch(B, T, N):
    """B windows of T rows of N random numbers, three quarters of them known."""
    known = torch.arange(B * T * N).view(B, T, N) % 4 > 0
    return Batch(numeric=torch.randn(B, T, N), categorical=torch.zeros(B, T, 0, dtype=torch.long),
                 observed=known, valid=known.any(dim=-1), clock=torch.zeros(B, T, 0),
                 time=torch.arange(T).expand(B, T).float())


def over_heads(q, k, v, *options, attend=F.scaled_dot_product_attention):
    """The mistake: SDPA on (B, T, nh, hs). Each row attends over its own heads, and nothing complains."""
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *options).transpose(1, 2)


def find_leaks(causal, attention=F.scaled_dot_product_attention, T=12, N=3):
    """(T, T) bool, True = the output row (line) depends on the input row (column), by autograd through base
    and model, every fourth cell hidden. AssertionError if the truth under a hidden cell reaches an output."""
    torch.manual_seed(0)
    model = TableTransformer(Config(N, [], seq_len=T, n_embd=32, causal=causal))
    nn.init.normal_(model.numeric_head.weight)              # a head of zeros would hide the network
    batch = random_batch(1, T, N)

    def output(numeric):
        return model(create_inputs(batch._replace(numeric=numeric), causal)).numeric[0].sum(dim=-1)     # (T,)
    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        gradient = torch.autograd.functional.jacobian(output, batch.numeric)[:, 0]                      # (T, T, N)
    assert (gradient[:, ~batch.observed[0]] == 0).all(), "a hidden value reaches an output"
    return (gradient != 0).any(dim=-1)


def print_shapes():
    """Parameters by part, one forward pass shape by shape, and one hidden number to its loss."""
    table, batch = tiny_batch()
    N = len(table.schema.numeric)
    model = TableTransformer(Config(N, table.schema.vocab_sizes(), seq_len=table.seq_len))
    for name, part in model.named_modules():
        if name and name < "blocks.1":                      # other blocks look alike
            size = sum(p.numel() for p in part.parameters())
            part.register_forward_hook(lambda _, __, y, name=name, size=size: print(
                f"{name:<22}{tuple(y.shape)!s:<14}{size:>9,} parameters"))
    hidden = create_masks(batch.observed, 0.3, step_generator(2))
    inputs = create_inputs(batch._replace(observed=batch.observed & ~hidden), causal=False)
    with torch.no_grad():
        prediction = model(inputs)
    print("untrained, the prediction is the base:", torch.equal(prediction.numeric, inputs.base))
    b, t, j = hidden[..., :N].nonzero()[0].tolist()
    truth, guess = float(batch.numeric[b, t, j]), float(prediction.numeric[b, t, j])
    print(f"{table.schema.numeric[j]} in window {b}, row {t}, is hidden: truth {truth:.2f}, prediction {guess:.2f}, "
          f"squared error {(truth - guess) ** 2:.3f}")
    targets = Targets(batch.numeric, batch.categorical, hidden)
    print("sums of the numeric and of the categorical loss:", sum_losses(prediction, targets, torch.ones(N)).tolist())


def bench(device="cuda" if torch.cuda.is_available() else "cpu"):
    """The median time of 15 training steps: a mean would count the neighbours' work as ours."""
    for B, T, D, n_head in ((32, 96, 128, 4), (16, 256, 384, 6), (14, 1024, 128, 4)):
        model = TableTransformer(Config(7, [], 0, T, 4, n_head, D)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        inputs = move(create_inputs(random_batch(B, T, 7), causal=False), device)
        for dtype in (torch.float32, torch.bfloat16):
            times = []
            for _ in range(15):
                start = time.perf_counter()
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    prediction = model(inputs)
                prediction.numeric.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                float(prediction.numeric.detach().sum())    # waits for a GPU
                times.append(1e3 * (time.perf_counter() - start))
            print(f"T {T}, B {B}, D {D}, {dtype}: {sorted(times)[7]:.1f} ms a step", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaks", action="store_true", help="who depends on whom, as a picture in text")
    parser.add_argument("--bench", action="store_true", help="how long a training step takes")
    args = parser.parse_args()
    if args.bench:
        bench()
    elif args.leaks:
        print("a line an output row, 1 = it depends on this input row", find_leaks(False).int(), sep="\n")
        print("causal", find_leaks(True).int(), sep="\n")
        print("causal, over the wrong axis: what is left comes from the base and from the step to the row before")
        print(find_leaks(True, over_heads).int())
    else:
        print_shapes()
