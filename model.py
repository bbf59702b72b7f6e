"""
The transformer and its loss. One token is one row of the table.

    python model.py              # parameters by part, and one forward pass shape by shape
    python model.py --leaks      # which output rows depend on which input rows, found with autograd
    python model.py --bench      # milliseconds a training step

The words, used everywhere:

    B   batch, windows at a time            N   numeric columns         D    width of the residual stream (--n_embd)
    T   time steps, rows of a window        K   categorical columns     nh   heads (--n_head)
    C   clock features (0 or 4)             F   columns, N + K          hs   head size, D / nh
    V_k ids of categorical column k: 0 = [MASK], 1 = [UNK], then its V_k - 2 own values, the most frequent first

    valid     (B, T)        True = a real row, False = padding
    observed  (B, T, F)     True = the table has a value here
    hidden    (B, T, F)     True = we took this value away, the model must guess it
    shown     (B, T, F)     True = the embedding gets a value here and not [MASK]
    known     (B, T, F)     True = observed and not hidden; guesses and statistics are made from these cells alone
    score     (B, T, F)     True = this cell counts in the loss
    attend    (B, 1, T, T)  True = this query may look at this key
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """The shape of a model; goes into a checkpoint as a dict."""
    n_numeric: int              # N
    vocab_sizes: list           # V_k of the K categorical columns
    n_clock: int = 0            # C
    seq_len: int = 96           # the longest T
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    causal: bool = False        # False: every row sees every row. True: a row sees itself and the past


# -----------------------------------------------------------------------------
# attention

def rotary_table(T, head_size, base=100.0):
    """cos and sin, each (T, hs/2), of the angles by which each pair of channels turns at each row (Su 2021).
    The base is 100 and not the 10,000 of language models: a window is about a hundred rows, not thousands."""
    frequency = base ** (-torch.arange(0, head_size, 2) / head_size)            # (hs/2,)
    angle = torch.arange(T)[:, None] * frequency                                # (T, hs/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn (B, nh, T, hs) by its row's angle; q @ k then depends on how far apart two rows are, not on where."""
    a, b = x.chunk(2, dim=-1)                                                   # (B, nh, T, hs/2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)            # (B, nh, T, hs)


def plain_attention(q, k, v, attend=None):
    """softmax(q k' / sqrt(hs)) v, as Vaswani 2017 writes it: the reference that the fused kernel is tested against.
    q, k, v: (B, nh, T, hs); attend: broadcasts to (B, nh, T, T), True = may look."""
    weight = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])                   # (B, nh, T, T)
    if attend is not None:
        weight = weight.masked_fill(~attend, float("-inf"))
    return weight.softmax(dim=-1) @ v                                           # (B, nh, T, hs)


class SelfAttention(nn.Module):
    """Multi-head attention over the rows of a window."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout, self.causal = config.n_head, config.dropout, config.causal
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, attend, cos, sin):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, D // self.n_head).unbind(dim=2)    # (B, T, nh, hs)
        # heads go before rows: on (B, T, nh, hs) the kernel would run without complaint and attend over the heads
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))                        # (B, nh, T, hs)
        q, k = rotate(q, cos, sin).type_as(v), rotate(k, cos, sin).type_as(v)   # cos is float32, v may be bfloat16
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, is_causal=self.causal,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))                    # (B, T, D)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x)))                                    # (B, T, D)


class Block(nn.Module):
    """Pre-norm: the residual stream itself is never normalised, so gradients pass through it untouched."""

    def __init__(self, config):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(config.n_embd), SelfAttention(config)
        self.norm2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, attend, cos, sin):
        x = x + self.drop(self.attn(self.norm1(x), attend, cos, sin))
        return x + self.drop(self.mlp(self.norm2(x)))


# -----------------------------------------------------------------------------
# from cells to rows and back

class RowEmbedding(nn.Module):
    """A row is the sum of its cells and of its clock.

    A number is its value times a vector of its column, a category the vector of its id. Where a cell is not shown its
    pencilled-in value stands in for it, plus the column's [MASK] vector that says so. Missing in the file and hidden
    by us look the same here; only the loss knows.
    """

    def __init__(self, config):
        super().__init__()
        N, K, C = config.n_numeric, len(config.vocab_sizes), config.n_clock
        self.weight = nn.Parameter(torch.empty(N + N + K + C, config.n_embd))   # values, [MASK] vectors, clock
        self.bias = nn.Parameter(torch.zeros(config.n_embd))                    # the sum of the columns' biases
        # one table for all categorical columns, column after column. Row 0 belongs to nobody: it is [UNK] of every
        # column, and padding_idx keeps it at zero
        offset = torch.tensor([1] + config.vocab_sizes[:-1] if K else [], dtype=torch.long).cumsum(0)
        self.register_buffer("offset", offset, persistent=False)                # (K,)
        self.categories = nn.Embedding(1 + sum(config.vocab_sizes), config.n_embd, padding_idx=0)

    def forward(self, values, ids, shown, clock):
        # values (B, T, N), ids (B, T, K), shown (B, T, F), clock (B, T, C)
        x = torch.cat((values, (~shown).type_as(values), clock), dim=-1)        # (B, T, N + F + C)
        rows = torch.where(ids == 1, 0, ids + self.offset)                      # (B, T, K) rows of the one table
        return x @ self.weight + self.bias + self.categories(rows).sum(dim=2)   # (B, T, D)


def window_scale(numeric, known):
    """Level and spread of each column in each window, from known cells alone (Kim 2022, reversible normalisation).

    numeric (B, T, N), known (B, T, N) bool. Returns center and scale, (B, 1, N). The spread counts one cell more than
    there are, at distance 1 (a column's spread over all train rows): a window with no spread is not blown up by
    dividing through almost nothing, and one without a known cell has center 0 and scale 1, no branch needed.
    """
    count = known.sum(dim=1, keepdim=True)                                      # (B, 1, N)
    center = torch.where(known, numeric, 0.0).sum(dim=1, keepdim=True) / count.clamp(min=1)
    square = torch.where(known, numeric - center, 0.0).square().sum(dim=1, keepdim=True)
    return center, ((square + 1) / (count + 1)).sqrt()


class Guess(NamedTuple):
    """What the model says of each cell."""
    numeric: torch.Tensor       # (B, T, N) float32
    logits: list                # K of (B, T, V_k - 2) float32
    scale: torch.Tensor         # (B, 1, N), the spread that the loss measures errors in; 1.0 where causal


class TableTransformer(nn.Module):
    """masking.Inputs -> Guess.

    The heads predict the correction to what is pencilled in and start at zero: before its first step the model IS
    linear interpolation and the nearest known category (or, causal, repetition of the last row), and training is
    judged against that.
    """

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head or config.n_embd // config.n_head % 2:
            raise ValueError(f"n_embd {config.n_embd} must be n_head {config.n_head} times an even number")
        self.config = config
        # a column's own values are the classes; one class at least, though a column may have no value in train
        self.classes = [max(1, v - 2) for v in config.vocab_sizes]
        self.embed = RowEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.trust = nn.Parameter(torch.full((len(self.classes),), 5.0))        # in the pencilled-in category, log-odds
        self.head = nn.Linear(config.n_embd, config.n_numeric + sum(self.classes))      # all columns' heads in one
        cos, sin = rotary_table(config.seq_len, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        for name, p in self.named_parameters():
            if name.endswith("proj.weight"):    # 2 * n_layer additions to the residual stream keep its variance
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.embed.categories.weight[0])                         # [UNK]

    def forward(self, inputs):
        numeric, ids, shown, known, pencil, pencil_ids, clock, attend = inputs
        T, N = numeric.shape[1:]
        # the window's own level and spread would tell a causal model about its future
        center, scale = (0.0, 1.0) if self.config.causal else window_scale(numeric, known[..., :N])     # (B, 1, N)
        values = (torch.where(shown[..., :N], numeric, pencil) - center) / scale                        # (B, T, N)
        x = self.embed(values, torch.where(shown[..., N:], ids, pencil_ids), shown, clock)              # (B, T, D)
        for block in self.blocks:
            x = block(x, attend, self.cos[:T], self.sin[:T])
        out = self.head(self.norm(x)).float()                                   # (B, T, N + all classes)
        correction, *logits = out.split([N] + self.classes, dim=-1)
        for k, n in enumerate(self.classes):
            pencilled = pencil_ids[..., k:k + 1] == torch.arange(2, 2 + n, device=out.device)           # (B, T, n)
            logits[k] = logits[k] + self.trust[k] * pencilled
        return Guess(pencil + scale * correction, logits, scale)


# -----------------------------------------------------------------------------
# loss

def count_scored(targets):
    """masking.Targets -> (2,) float32: how many numeric and how many categorical cells are scored."""
    N = targets.numeric.shape[-1]
    return torch.stack([targets.score[..., :N].sum(), targets.score[..., N:].sum()]).float()


def sum_losses(guess, targets, loss="mse"):
    """Sums over the scored cells, (2,) float32: squared (or Huber) error of numbers, cross-entropy of categories.

    guess: Guess; targets: masking.Targets; loss: "mse" or "huber". Numbers count in units of their window's spread, so
    that a calm column weighs as much as a wild one, and both about as much as a category.
    A sum, so that the caller divides once by the count of the whole step, clamped to 1: a mean over an empty
    selection is 0/0. Targets hold no NaN, so torch.where is safe: what it drops has a gradient of 0, not of NaN.
    """
    N = targets.numeric.shape[-1]
    error = F.mse_loss if loss == "mse" else F.huber_loss
    error = error(guess.numeric / guess.scale, targets.numeric / guess.scale, reduction="none")         # (B, T, N)
    total = torch.where(targets.score[..., :N], error, 0.0).sum()
    entropy = total.new_zeros(())
    for k, logits in enumerate(guess.logits):
        target = (targets.categorical[..., k] - 2).clamp(min=0)                 # unscored cells get any class at all
        nll = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")             # (B, T)
        entropy = entropy + torch.where(targets.score[..., N + k], nll, 0.0).sum()
    return torch.stack([total, entropy])


# -----------------------------------------------------------------------------
# run by itself

def print_shapes():
    """Parameters by part, and one forward pass over the tiny table, shape by shape."""
    from data import step_generator, tiny_batch
    from masking import Inputs, create_attention_mask, create_masks, pencil_category, pencil_in
    table, batch = tiny_batch()
    N = len(table.schema.numeric)
    model = TableTransformer(Config(N, table.schema.vocab_sizes(), table.schema.n_clock, table.seq_len))
    for name, part in model.named_children():
        print(f"{name:<8}{sum(p.numel() for p in part.parameters()):>9,} parameters")
    known = batch.observed & ~create_masks(batch.observed, 0.4, step_generator(3))
    inputs = Inputs(batch.numeric, batch.categorical, known, known, pencil_in(batch.numeric, known[..., :N], False),
                    pencil_category(batch.categorical, known[..., N:], False), batch.clock,
                    create_attention_mask(batch.valid, causal=False))
    for name, x in inputs._asdict().items():
        print(f"{name:<22}{tuple(x.shape)}")
    for name, part in model.named_modules():
        if name.startswith("blocks.0") or "blocks" not in name and name:        # the other blocks look the same
            part.register_forward_hook(lambda part, x, out, name=name: print(f"{name:<22}{tuple(out.shape)}"))
    guess = model(inputs)
    print(f"{'guess':<22}{tuple(guess.numeric.shape)}\n{'logits':<22}{[tuple(x.shape) for x in guess.logits]}")
    print(f"untrained, the guess is the pencilled-in value: {torch.equal(guess.numeric, inputs.pencil)}")


def find_leaks(causal, T=12, N=3):
    """(T, T) bool, True = output row depends on input row, by autograd through pencil and model with random weights;
    every third cell is hidden. The truth under a hidden cell must reach nobody: its own gradient is checked too."""
    from masking import Inputs, pencil_in
    torch.manual_seed(0)
    model = TableTransformer(Config(N, [], 0, T, n_embd=32, causal=causal))
    nn.init.normal_(model.head.weight)                      # a head of zeros would hide every dependence
    numeric = torch.randn(1, T, N, requires_grad=True)
    known = (torch.arange(T * N).view(1, T, N) % 3 > 0)
    ids = torch.zeros(1, T, 0, dtype=torch.long)
    inputs = Inputs(numeric, ids, known, known, pencil_in(numeric, known, causal), ids, torch.zeros(1, T, 0), None)
    rows = []
    for row in model(inputs).numeric[0]:                    # (N,), one output row after the other
        gradient, = torch.autograd.grad(row.sum(), numeric, retain_graph=True)
        assert (gradient[~known] == 0).all(), "a hidden value reaches the output"
        rows.append(gradient[0].abs().sum(-1) > 0)
    return torch.stack(rows)


def bench(repeats=5):
    """Milliseconds of a training step, and the share of a plain matrix product's speed that it reaches."""
    import time
    from masking import Inputs
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def seconds(work):
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return sorted(times[1:])[repeats // 2]              # the first one warms up

    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048, device=device, dtype=dtype)
        peak = 2 * 2048 ** 3 / seconds(lambda: a @ a)
        for T, B, D, n_layer, n_head in ((96, 32, 128, 4, 4), (256, 16, 384, 6, 6), (1024, 14, 128, 4, 4)):
            model = TableTransformer(Config(7, [], 4, T, n_layer, n_head, D)).to(device)
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            x, seen = torch.randn(B, T, 7, device=device), torch.rand(B, T, 7, device=device) > 0.3
            ids = torch.zeros(B, T, 0, dtype=torch.long, device=device)
            inputs = Inputs(x, ids, seen, seen, x, ids, torch.zeros(B, T, 4, device=device), None)

            def step():
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    guess = model(inputs)
                F.mse_loss(guess.numeric, x + 1).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

            took = seconds(step)
            # 6 operations a parameter and token, and attention's two T x T products, as nanoGPT counts them
            work = B * T * (6 * sum(p.numel() for p in model.parameters()) + 12 * n_layer * D * T)
            print(f"T {T:4d} B {B:2d} D {D:3d} {str(dtype)[6:]:<9}{took * 1e3:8.1f} ms a step {B * T * 7 / took:11,.0f} cells/s "
                  f"{work / took / 1e9:8.1f} GFLOP/s, {work / took / peak:.2f} of a matrix product")


if __name__ == "__main__":
    import argparse
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaks", action="store_true", help="who depends on whom, as a picture in text")
    parser.add_argument("--bench", action="store_true", help="how long a training step takes on this machine")
    args = parser.parse_args()
    if args.bench:
        bench()
    elif args.leaks:
        for causal in (False, True):
            print("autoregressive:" if causal else "masked:", "a line an output row, # = it depends on that input row")
            print("\n".join("    " + " ".join("#" if x else "." for x in row) for row in find_leaks(causal).tolist()))
    else:
        print_shapes()
