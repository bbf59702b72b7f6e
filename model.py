"""
The transformer and its loss. One token is one row of the table.

    python model.py             # parameters by part, one forward pass shape by shape, one cell to its loss
    python model.py --leaks     # which output rows depend on which input rows, found with autograd

    B    windows in a batch                     N    numeric columns
    T    time steps, rows of a window           K    categorical columns
    D    width of the residual stream           F    columns, N + K
    nh   heads                                  C    clock features, see data.time_features
    hs   head size, D / nh
    V_k  ids of categorical column k: 0 = missing, 1 = [UNK], then its V_k - 2 own values, commonest first

    valid     (B, T)        True = a real row, False = padding
    observed  (B, T, F)     True = the table has a value here
    hidden    (B, T, F)     True = we took this value away, the model must guess it
    known     (B, T, F)     True = observed and not hidden: the base and all statistics come from these alone
    base      (B, T, N)     the guess that the model corrects: a straight line, the last value, or what a
                            closed form says, linear algebra on the train rows (gaussian_fill, autoregress)
    score     (B, T, F)     True = this cell counts in the loss
    attend    (B, 1, T, T)  True = this query may look at this key
"""
import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import UNK_ID, Batch, step_generator, tiny_batch
from masking import Targets, create_inputs, create_masks, hide, move

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
    clip: float = 10.0          # values and steps enter the network clipped to +- this
    closed: bool = False        # --base closed: the base is the closed form, not the line or the last value
    causal: bool = False        # False: a row sees all rows of its window. True: itself and the past


def apply_rotary(x, rotary):
    """Turn pairs of channels of q or k (B, nh, T, hs) by an angle that grows with the row (Su 2021): in a
    product of the two only the difference of their angles is left, the distance of their rows."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))             # (B, nh, T, hs/2)
    turned = torch.view_as_real(pairs * rotary)                                 # (B, nh, T, hs/2, 2)
    return turned.flatten(-2).type_as(x)                                        # x may be bfloat16


def plain_attention(q, k, v, attend=None):
    """softmax(q k^T / sqrt(hs)) v (Vaswani 2017): each row takes the mean of all values (B, nh, T, hs),
    weighted by how well its query fits their keys. The fused kernel used below is tested against this."""
    fit = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])                      # (B, nh, T, T)
    if attend is not None:
        fit = fit.masked_fill(~attend, -math.inf)
    return fit.softmax(dim=-1) @ v                                              # (B, nh, T, hs)


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
        by_head = B, T, self.n_head, D // self.n_head
        q = q.view(by_head).transpose(1, 2)                                     # (B, nh, T, hs)
        k = k.view(by_head).transpose(1, 2)
        v = v.view(by_head).transpose(1, 2)
        q = apply_rotary(q, rotary)                                             # (B, nh, T, hs)
        k = apply_rotary(k, rotary)
        # fused, without the (T, T) weights (Dao 2022); a mask or is_causal, never both
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout,
                                           is_causal=self.causal)               # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, D)                                  # the heads side by side
        return self.proj(y)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.norm1 = nn.LayerNorm(D)
        self.attn = SelfAttention(config)               # moves things between rows
        self.norm2 = nn.LayerNorm(D)
        fc = nn.Linear(D, 4 * D, bias=False)
        proj = nn.Linear(4 * D, D, bias=False)
        self.mlp = nn.Sequential(OrderedDict(fc=fc, gelu=nn.GELU(), proj=proj))     # works on each row alone
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, attend, rotary):
        # pre-norm: the stream itself is never normalised, so gradients pass through it untouched
        x = x + self.drop(self.attn(self.norm1(x), attend, rotary))             # (B, T, D)
        x = x + self.drop(self.mlp(self.norm2(x)))
        return x


class RowEmbedding(nn.Module):
    """A row is the sum of its cells and its clock. A number is its value times a vector of its column, plus
    its step times another: the change from the row before, or that to the next row if a closed form guesses
    it. A category is the vector of its id. Where nothing is known a guess stands in, and the [MASK] vector of
    the column says so. All these vectors but the ids' are the columns of one Linear."""
    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        sizes = config.vocab_sizes
        n_columns = config.n_numeric + len(sizes)
        self.numbers = nn.Linear(2 * config.n_numeric + n_columns + config.n_clock, D)
        # padding_idx keeps [UNK] at zero: a value never seen in training has taught us nothing
        self.categories = nn.ModuleList(nn.Embedding(size, D, padding_idx=UNK_ID) for size in sizes)

    def forward(self, values, steps, ids, known, clock):
        masked = (~known).type_as(values)                                       # (B, T, F)
        # 4: a step is small beside its value, and must not drown in it
        x = torch.cat([values, 4 * steps, masked, clock], dim=-1)               # (B, T, 2N + F + C)
        x = self.numbers(x)                                                     # (B, T, D)
        for k, embedding in enumerate(self.categories):
            x = x + embedding(ids[..., k])                                      # (B, T, D)
        return x


def window_scale(numeric, known):
    """Level and spread of each column in each window, from known cells alone (Kim 2022), two (B, 1, N). The
    spread counts one cell more than there are, at distance 1, the spread of the train rows: a constant window
    is not blown up, and one without known cells gets 0 and 1."""
    count = known.sum(dim=1, keepdim=True)                                      # (B, 1, N)
    total = torch.where(known, numeric, 0.0).sum(dim=1, keepdim=True)           # (B, 1, N)
    center = total / count.clamp(min=1)
    distance = torch.where(known, numeric - center, 0.0)                        # (B, T, N)
    square = distance.square().sum(dim=1, keepdim=True)                         # (B, 1, N)
    return center, ((square + 1) / (count + 1)).sqrt()


class Prediction(NamedTuple):
    """What the model says of each cell."""
    numeric: torch.Tensor       # (B, T, N) float32
    scale: torch.Tensor         # (B, T, N) float32, how far off it takes that to be, up to a factor a column
    logits: list                # K of (B, T, V_k - 2) float32, of the column's own values

    def answer(self):
        """The numbers, and the likeliest ids (B, T, K) int64."""
        ids = [logits.argmax(dim=-1, keepdim=True) + 2 for logits in self.logits]
        ids = torch.cat([self.numeric[..., :0].long(), *ids], dim=-1)           # K may be 0
        return self.numeric, ids

    def interval(self, factor, coverage):
        """(4, B, T, F): the answer, its low and its high end, `factor` (N,) times the scale off,
        and the probability that the truth is there; a category is its own two ends."""
        value = torch.cat(self.answer(), dim=-1)                                # (B, T, F)
        half = torch.zeros_like(value)
        chance = torch.full_like(value, coverage)
        N = self.numeric.shape[-1]
        half[..., :N] = factor * self.scale
        for k, logits in enumerate(self.logits):
            chances = logits.softmax(dim=-1)                                    # (B, T, V_k - 2)
            chance[..., N + k] = chances.amax(dim=-1)
        return torch.stack([value, value - half, value + half, chance])


class TableTransformer(nn.Module):
    """masking.Inputs -> Prediction. The heads correct the base and start at zero: before its first step the
    model IS its base (a closed form, a straight line, the last row), and training is judged against that."""
    def __init__(self, config, closed_form=None):
        super().__init__()
        self.config = config
        self.closed_form = closed_form          # stays on the CPU, where create_inputs needs it
        self.trust = 1.0                        # share of the correction that is used, see train_ar.fit_trust
        self.embed = RowEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.numeric_head = nn.Linear(config.n_embd, config.n_numeric)
        self.scale_head = nn.Linear(config.n_embd, config.n_numeric)
        self.class_heads = nn.ModuleList(nn.Linear(config.n_embd, size - 2) for size in config.vocab_sizes)
        hs = config.n_embd // config.n_head
        # 100, where language models have 10,000: a window is about a hundred rows, not thousands
        frequency = 100.0 ** (-torch.arange(0, hs, 2) / hs)                     # (hs/2,)
        angle = torch.arange(config.seq_len)[:, None] * frequency               # (T, hs/2)
        rotary = torch.polar(torch.ones_like(angle), angle)                     # complex, of length 1
        self.register_buffer("rotary", rotary, persistent=False)
        for name, p in self.named_parameters():
            if "head" in name or name == "embed.numbers.bias":
                nn.init.zeros_(p)
            elif "proj" in name:        # adds to the stream, 2 n_layer times: smaller, to keep its size
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        for embedding in self.embed.categories:
            nn.init.zeros_(embedding.weight[UNK_ID])        # normal_ has filled it
        self.n_params = sum(p.numel() for p in self.parameters())

    def forward(self, inputs):
        T, N = inputs.numeric.shape[1:]
        numeric = inputs.numeric if self.config.causal else inputs.base         # causal: that is a row ahead
        center = torch.zeros_like(numeric)
        spread = torch.ones_like(numeric)
        if not self.config.causal:      # (the level of the window would tell a causal model its future)
            center, spread = window_scale(numeric, inputs.known[..., :N])       # (B, 1, N) each
        elif self.config.closed:        # less the mean so far: absolute levels would be learnt by heart
            count = torch.arange(1, T + 1, device=numeric.device)[:, None]      # (T, 1)
            center = numeric.cumsum(dim=1) / count
        values = (numeric - center) / spread                                    # (B, T, N)
        steps = values.diff(dim=1, prepend=values[:, :1])                       # the first is 0
        if self.config.causal and self.config.closed:
            steps = inputs.base - numeric                   # the one that the closed form takes
        clip = self.config.clip
        values = values.clamp(-clip, clip)
        steps = steps.clamp(-clip, clip)
        x = self.embed(values, steps, inputs.categorical, inputs.known, inputs.clock)       # (B, T, D)
        for block in self.blocks:
            x = block(x, inputs.attend, self.rotary[:T])                        # (B, T, D)
        x = self.norm(x)
        # a correction of 1 is one spread, or as far as the closed form may be off: 0 where a cell is known
        unit = spread if inputs.deviation is None else inputs.deviation
        correction = unit * self.numeric_head(x).float()                        # (B, T, N)
        # detached: nothing else is learnt for its sake, so to say how sure it is costs no accuracy
        log_scale = self.scale_head(x.detach()).float().clamp(-10, 10)
        scale = torch.where(unit > 0, unit, 1.0) * log_scale.exp()
        logits = []
        for k, head in enumerate(self.class_heads):
            is_base = F.one_hot(inputs.categorical[..., k], 2 + head.out_features)      # (B, T, V_k)
            logits.append(head(x).float() + PRIOR_LOGIT * is_base[..., 2:])     # (B, T, V_k - 2)
        return Prediction(inputs.base + self.trust * correction, scale, logits)

    def inputs(self, batch):
        """data.Batch, `observed` = what is known -> masking.Inputs, with the base that the heads correct."""
        closed_form = self.closed_form if self.config.closed else None
        return create_inputs(batch, self.config.causal, closed_form)

    @torch.no_grad()
    def predict(self, inputs):
        """masking.Inputs, on the CPU -> Prediction, without gradients and there as well."""
        numeric, scale, logits = self(move(inputs, self.norm.weight.device))
        return Prediction(numeric.cpu(), scale.cpu(), [x.cpu() for x in logits])

    def rollout(self, batch, clock, predict=None):
        """Say what comes next, append it, and go on from there, looking at the last T rows at most.
        batch: histories of equal length; clock (B, steps, C): of the rows to come; predict: Inputs -> numbers
        and ids, else the model's. Returns the Batch of the rows to come; columns without values get none."""
        predict = predict or (lambda inputs: self.predict(inputs).answer())
        N = batch.numeric.shape[-1]
        ever = batch.observed.any(dim=1, keepdim=True)                          # (B, 1, F)
        for now in clock.split(1, dim=1):                                       # (B, 1, C)
            # the whole window is run again for each row: no cache of keys and values, to stay readable
            inputs = self.inputs(batch.rows(-self.config.seq_len, None))
            numeric, ids = predict(inputs)                                      # (B, T, N), (B, T, K)
            numeric = numeric[:, -1:] * ever[..., :N]                           # (B, 1, N)
            ids = ids[:, -1:] * ever[..., N:]                                   # (B, 1, K)
            row = Batch(numeric=numeric, categorical=ids, observed=ever, valid=batch.valid[:, -1:], clock=now,
                        time=batch.time[:, -1:] + 1)
            batch = Batch._make(torch.cat(pair, dim=1) for pair in zip(batch, row))
        return batch.rows(-clock.shape[1], None)


def count_scored(targets):
    """masking.Targets -> (3,) float32: how many cells each of the losses below is a sum over."""
    N = targets.numeric.shape[-1]
    numeric = targets.score[..., :N].sum()
    categorical = targets.score[..., N:].sum()
    return torch.stack([numeric, categorical, numeric]).float()


def sum_losses(prediction, targets, base_rmse, loss="mse"):
    """Sums over scored cells, (3,) float32: squared or Huber errors of numbers, cross-entropy of categories,
    and of the scales the negative log-likelihood of the errors as they are (Laplace: no outlier rules it).
    base_rmse (N,) is the base's own error; in these units a calm column weighs as much as a wild one. The
    caller divides once, by the count of a whole step clamped to 1: the mean of no cells is 0/0."""
    N = targets.numeric.shape[-1]
    scored = targets.score[..., :N]
    measure = {"mse": F.mse_loss, "huber": F.huber_loss}[loss]
    guess = prediction.numeric / base_rmse                                      # (B, T, N)
    truth = targets.numeric / base_rmse
    error = measure(guess, truth, reduction="none")                             # (B, T, N), of each cell
    # Targets hold no NaN, so torch.where is safe: what it drops has gradient 0, but a dropped NaN has NaN
    numeric_loss = torch.where(scored, error, 0.0).sum()
    class_loss = torch.zeros_like(numeric_loss)
    for k, logits in enumerate(prediction.logits):
        target = (targets.categorical[..., k] - 2).clamp(min=0)                 # unscored: any class will do
        error = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")       # (B, T)
        class_loss = class_loss + torch.where(targets.score[..., N + k], error, 0.0).sum()
    off = (prediction.numeric.detach() - targets.numeric).abs().clamp(min=1e-4)     # at 0 a scale vanishes
    nll = off / prediction.scale + prediction.scale.log()
    scale_loss = torch.where(scored, nll, 0.0).sum()
    return torch.stack([numeric_loss, class_loss, scale_loss])


# ---- the rest can be skipped at first reading

def explain_non_finite(model, examples, windows, names):
    """Where a non-finite gradient may come from, in lines. examples: (Inputs, Targets) of each forward
    pass; windows: the rows of each, as in Table.sample; names: of the numeric columns."""
    for (inputs, _), rows in zip(examples, windows):
        known = inputs.known[..., :len(names)]
        size = torch.where(known, inputs.numeric.abs(), 0.0)                    # (B, T, N)
        size[size.isnan()] = math.inf                                           # a NaN is the largest of all
        largest, place = size.flatten(0, 1).max(dim=0)                          # (N,) each
        for j in largest.argsort(descending=True)[:3].tolist():
            b, t = divmod(int(place[j]), known.shape[1])
            yield f"{names[j]}: up to {largest[j]:.3g} scaled, in row {rows[b, 0] + t} of the sorted table"
    lost = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
    yield f"gradients not finite: {', '.join(lost[:3])} ({len(lost)} parameters)"
    yield "look at these rows; try a lower --lr or --clip, more --warmup_steps, --dtype float32; --resume"


def over_heads(q, k, v, attend=F.scaled_dot_product_attention, **options):
    """The mistake: SDPA on (B, T, nh, hs). Each row attends over its own heads, and nothing complains."""
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    return attend(*swapped, **options).transpose(1, 2)


def find_leaks(causal, attention=F.scaled_dot_product_attention, T=12, N=3):
    """(T, T) bool, True = the output row (line) depends on the input row (column), by autograd through base
    and model, every fourth cell hidden. AssertionError if the truth under a hidden cell reaches an output."""
    torch.manual_seed(0)
    model = TableTransformer(Config(N, [], seq_len=T, n_embd=32, causal=causal))
    nn.init.normal_(model.numeric_head.weight)              # a head of zeros would hide the network
    numeric = torch.randn(1, T, N)
    known = torch.arange(T * N).view(1, T, N) % 4 > 0
    none = torch.zeros(1, T, 0)
    time = torch.arange(T)[None].float()
    batch = Batch(numeric, none.long(), known, known.any(dim=-1), none, time)

    def output(numeric):
        inputs = create_inputs(batch._replace(numeric=numeric), causal)
        return model(inputs).numeric[0].sum(dim=-1)                             # (T,)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        slopes = torch.autograd.functional.jacobian(output, numeric)            # (T, 1, T, N)
    leaks = slopes[:, 0] != 0
    assert not leaks[:, ~known[0]].any(), "a hidden value reaches an output"
    return leaks.any(dim=-1)


@torch.no_grad()
def print_shapes():
    """Parameters by part, one forward pass shape by shape, and one hidden number to its loss."""
    table, batch = tiny_batch()
    N = len(table.schema.numeric)
    model = TableTransformer(Config(N, table.schema.vocab_sizes(), n_layer=1))  # more blocks look alike
    for name, part in list(model.named_modules())[1:]:
        size = sum(p.numel() for p in part.parameters())
        text = f"{name:<20}{size:>8,} parameters ->"
        # text=text keeps the one of this part: the hooks run when the loop is long over
        part.register_forward_hook(lambda _, __, y, text=text: print(text, tuple(y.shape)))
    hidden = create_masks(batch.observed, 0.3, step_generator(2))
    inputs = create_inputs(hide(batch, hidden), causal=False)
    prediction = model(inputs)
    print("untrained, the prediction is the base:", torch.equal(prediction.numeric, inputs.base))
    b, t, j = hidden[..., :N].nonzero()[0].tolist()
    truth = batch.numeric[b, t, j]
    guess = prediction.numeric[b, t, j]
    print(f"{table.schema.numeric[j]} in window {b}, row {t}, is hidden: truth {truth:.2f}, "
          f"prediction {guess:.2f}, squared error {(truth - guess) ** 2:.3f}")
    targets = Targets(batch.numeric, batch.categorical, hidden)
    sums = sum_losses(prediction, targets, base_rmse=1.0)
    print("sums of the losses of hidden numbers, categories, scales:", sums.tolist())


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--leaks", action="store_true", help="who depends on whom, as a picture in text")
    if parser.parse_args().leaks:
        print("a line an output row, 1 = it depends on this input row", find_leaks(False).int(), sep="\n")
        print("causal", find_leaks(True).int(), sep="\n")
        print("causal, over the wrong axis: what is left comes from the base and the step to the row before")
        print(find_leaks(True, over_heads).int())
    else:
        print_shapes()
