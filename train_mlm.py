"""
Masked modelling on a table that changes over time: hide some cells, learn to fill them in.

    python train_mlm.py                                     # simulated sensors, minutes on two cores
    python train_mlm.py --mask_prob 0.2
    python train_mlm.py --data my.csv --fill filled.csv     # your own file, and its holes filled
    python train_mlm.py --data my.csv --mask_style span     # whose holes come in runs of rows
    python train_mlm.py --score observed                    # the mistake of scoring what the model can see
    python train_mlm.py --resume --max_steps 2400           # go on from out/train_mlm/last.pt
    torchrun --standalone --nproc_per_node=2 train_mlm.py   # two processes, or two GPUs

Above the marker line stands what is particular to the objective; from there on train_mlm.py and train_ar.py
are the same, line for line. `diff train_mlm.py train_ar.py` shows what an objective is.
"""
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist

from data import (UNK_ID, Cells, check_target, draw_pictures, fail, load_table, make_parser, number,
                  replace_file, step_generator)
from masking import (Targets, bert_style_masking, create_inputs, create_masks, get_mask_probability, mix_up,
                     move, pencil_category, pencil_in, scorable)
from model import (Config, TableTransformer, count_scored, explain, judge, print_columns, print_table,
                   sum_losses, tally, within_clip)

SCRIPT = "train_mlm"

# -----------------------------------------------------------------------------
# the knobs of this objective; those of the loop are below, in add_loop_arguments

def get_parser():
    parser = make_parser(__doc__, SCRIPT, "sensors")
    share, rate = number(float, 0, 1), number(float, 0, 1, inside=True)         # with and without the ends

    add = parser.add_argument_group("objective").add_argument
    add("--mask_prob", type=rate, default=0.3, help="share of the observed cells hidden in training")
    add("--mask_prob_start", type=rate, help="progressive: start here, rise to --mask_prob (None: constant)")
    # real tables have few holes here and many there, and one model is to fill both
    add("--mask_spread", type=share, default=0.75,
        help="each window draws its own rate, off --mask_prob by up to this share of the way to 0 or 1, "
             "whichever is nearer")
    add("--mask_style", choices=["cell", "span"], default="cell", help="hide single cells or runs of rows")
    add("--mask_span", type=number(float, 1), default=12.0, help="mean rows of a run, for --mask_style span")
    add("--mixup", type=share, default=0.0,
        help="a training window's numbers are up to this share those of another window")
    # a sentence model meets no [MASK] in use, so BERT shows true words as well; real holes ARE [MASK]
    add("--mask_share", type=share, default=1.0, help="share of the hidden cells shown as [MASK] (BERT: 0.8)")
    add("--random_share", type=share, default=0.0, help="share shown as another value (BERT: 0.1)")
    add("--score", choices=["hidden", "observed"], default="hidden",
        help="cells in the training loss; observed is the identity-reconstruction mistake, as an experiment")
    add("--eval_mask_probs", type=rate, nargs="+", default=[0.125, 0.25, 0.375, 0.5],
        help="rates of evaluation, of single cells and, with --mask_style span, of runs as well")
    add("--fill", metavar="FILE", help="at the end write the table to this .csv, its holes filled")
    add("--category_weight", type=number(float, 0), default=1.0,
        help="of the categorical cells' loss beside the numeric cells'")

    add_loop_arguments(parser, max_steps=1200)
    return parser


def check(args, table):
    """What no flag can know alone."""
    if args.mask_share + args.random_share > 1:
        fail(f"--mask_share {args.mask_share} and --random_share {args.random_share} exceed 1 together")
    # runs of a given mean length leave gaps between them: they cannot hide any share one likes
    rate = max(args.mask_prob, args.mask_prob_start or 0.0)
    highest = max(rate + args.mask_spread * min(rate, 1 - rate), *args.eval_mask_probs)
    if args.mask_style == "span" and highest > 1 - 1 / args.mask_span:
        fail(f"--mask_span {args.mask_span:g} is too short to hide {highest:.0%} of the cells, "
             "which --mask_prob and --mask_spread, or --eval_mask_probs, ask for")
    if args.fill:                           # now, not after minutes of training
        check_target("--fill", args.fill, args.data)


# -----------------------------------------------------------------------------
# your own file: its holes filled

def apply_to_file(model, table, means, args):
    """--fill: write the table with a value in every hole. means: {column: {method: mean error on test}}."""
    if not args.fill:
        return
    # EVAL_ROWS, below the marker: as many rows as an evaluation takes at once
    schema, windows = table.schema, max(1, EVAL_ROWS // table.seq_len)
    names, learnt, parts = schema.numeric + schema.categorical, table.learnt().tolist(), []
    for these, owned in zip(*(x.split(windows) for x in table.owners())):
        batch, rows = table.batch(these), these[:, :1] + torch.arange(table.seq_len)            # (B, T)
        mine = (rows >= owned[:, :1]) & (rows < owned[:, 1:])       # each row from where it is most central
        # nothing is hidden now: what is not known is not there
        parts.append([x[mine] for x in model.predict(create_inputs(batch, batch.observed, CAUSAL))])
    numeric, ids = (torch.cat(x) for x in zip(*parts))          # (rows, N) and (rows, K), of each row once
    cells, worse = Cells(table, args), []
    print(f"\n{'filled':<32}{'cells':>11}{'no reading':>11}{'model':>11}{'linear':>11}  (test error)")
    for name, here, said, holes in zip(names, learnt, [*numeric.T, *ids.T], ~table.observed.T):     # (rows,)
        if here and holes.any():
            cells.text.loc[holes.numpy(), name] = cells.like(name, said[holes])
            ours, theirs = (means[name][method] for method in ("model", "linear"))
            worse += [name] * (ours > theirs)               # who fills such a column should know
            repaired = table.facts[name][0] if name in schema.numeric else 0
            print(f"{name:<32}{int(holes.sum()):>11,}{repaired:>11,}{ours:>11.4g}{theirs:>11.4g}")
    unseen = (table.categorical == UNK_ID).sum(dim=0).tolist()
    for what, which in {
            "interpolation did better on test in": worse,
            "left empty, since the train rows have no value of it": [
                name for name, here in zip(names, learnt) if not here],
            "left as it was": [name for name, kind in table.kinds.items() if kind.startswith("dropped")],
            "kept, though the train rows have no such category": [
                f"{name} ({n} rows)" for name, n in zip(schema.categorical, unseen) if n]}.items():
        if which:
            print(f"{what}: {', '.join(which)}")
    replace_file(args.fill, lambda path: cells.write(path, cells.text.sort_index()))
    print(f"wrote {args.fill}")


# -----------------------------------------------------------------------------
# THE OBJECTIVE: fill in the blanks

CAUSAL = False          # who may look where: every row of a window at every other


def objective(batch, args, generator, step=None, case=None):
    """data.Batch -> what the model sees, masking.Inputs, and what it is asked, masking.Targets.

    Training gives `step`, which sets the rate; evaluation gives `case`, style and rate, and hides as [MASK].
    """
    style, rate = case or (args.mask_style, None)
    if case is None:
        batch, end = mix_up(batch, args.mixup, generator), args.mask_prob
        rate = get_mask_probability(step, args.max_steps, args.mask_prob_start or end, end)
        u = 2 * torch.rand(len(batch.valid), 1, 1, generator=generator) - 1     # each window has its own rate
        rate = rate + u * args.mask_spread * min(rate, 1 - rate)                # (B, 1, 1)
    answerable = scorable(batch.observed, batch.categorical)                    # has a right answer
    hidden = create_masks(answerable, rate, generator, style, args.mask_span)
    numeric, categorical, shown = bert_style_masking(batch.numeric, batch.categorical, batch.observed, hidden,
                                                     generator, 1.0 if case else args.mask_share,
                                                     args.random_share)
    # guesses and statistics come from known cells alone: a random or kept cell is shown, but not known
    inputs = create_inputs(batch, batch.observed & ~hidden, CAUSAL)
    inputs = inputs._replace(numeric=numeric, categorical=categorical, shown=shown)
    score = answerable if args.score == "observed" and case is None else hidden
    return inputs, Targets(batch.numeric, batch.categorical, score)


def eval_cases(args):
    return [(style, rate) for style in sorted({"cell", args.mask_style}) for rate in args.eval_mask_probs]


def baselines(inputs, args):
    """What one would fill in without a model: {name: (numbers (B, T, N), ids (B, T, K))}."""
    N, mode = inputs.numeric.shape[-1], 2                                       # id 2 is the commonest value
    last = pencil_in(inputs.numeric, inputs.known[..., :N], causal=True)
    last_ids = pencil_category(inputs.categorical, inputs.known[..., N:], causal=True)
    return {"linear": (inputs.pencil, inputs.pencil_ids.clamp(min=mode)),       # categories: the nearest one
            "last": (last, last_ids.clamp(min=mode)),
            "mean": (torch.zeros_like(last), torch.full_like(last_ids, mode))}  # 0: centre of the train rows


def examine(model, table, errors, cells, args):
    """Print what the test split comes to. Returns what results.json keeps of it; a curve to draw, as the name
    of its axis, the cases along it and {method: means}; and windows to draw, as a Batch, which of its cells
    had to be guessed, (B, T, F) bool, and {method: guesses (B, T, N)}."""
    rates, test = args.eval_mask_probs, {}
    shares = {f"{rate:.1%}": i for i, rate in enumerate(rates)}
    for style, i in zip(sorted({"cell", args.mask_style}), torch.arange(len(cells)).split(len(rates))):
        test[style] = judge({name: e[:, i] for name, e in errors.items()}, cells[i], table.schema)
        print_table("mean squared error, scaled" + ", runs" * (style == "span"), shares, test[style], "mse")
        print_table("accuracy of categories" + ", runs" * (style == "span"), shares, test[style], "accuracy")
    windows = table.starts("test", table.seq_len)
    batch = table.batch(windows[len(windows) // 2:][:3])                        # from the middle of the split
    inputs, targets = objective(batch, args, step_generator(0), case=(args.mask_style, min(0.3, max(rates))))
    return ({"eval_mask_probs": rates, "test": test}, ("share of cells hidden", rates, test[args.mask_style]),
            (batch, targets.score, {"linear": inputs.pencil, "model": model.predict(inputs)[0]}))


# ---- from here to the end train_mlm.py and train_ar.py are the same, line for line ----

EVAL_ROWS = 3072        # in an evaluation batch; fixed, so that its masks do not depend on --batch_size
LOG = ("step", "train", "numeric", "categorical", "val", "lr", "norm", "cells_per_s")


def add_loop_arguments(parser, max_steps):
    """The flags of the model, of its optimisation and of the run."""
    share, count, size = number(float, 0, 1), number(int, 0), number(int, 1)
    add = parser.add_argument_group("model").add_argument
    add("--n_layer", type=size, default=4, help="transformer blocks")
    add("--n_head", type=size, default=4, help="attention heads")
    add("--n_embd", type=size, default=128, help="width of the residual stream")
    add("--dropout", type=share, default=0.0, help="while training")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", type=size, default=32, help="windows in a forward pass")
    add("--grad_accum", type=size, default=1, help="forward passes in a step")
    add("--max_steps", type=count, default=max_steps, help="optimiser steps")
    add("--lr", type=number(float, 0), default=2e-3, help="peak learning rate of AdamW")
    add("--min_lr", type=number(float, 0), default=5e-5, help="learning rate at the end of the cosine")
    # Adam's averages are worth little before they have seen some steps
    add("--warmup_steps", type=count, default=100, help="linear warmup")
    add("--weight_decay", type=number(float, 0), default=0.1, help="of matrices, not of biases and norms")
    add("--grad_clip", type=number(float, 0), default=1.0, help="largest gradient norm (0: any)")
    add("--loss", choices=["mse", "huber"], default="mse", help="of numeric cells")

    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto is cuda where there is one, else cpu")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="of autocast; auto is bfloat16 where the GPU has it, float16 on an older one, float32 on a CPU "
             "(on one with bfloat16 instructions that pays for wider models, and from --seq_len 1024 on)")
    add("--compile", action="store_true", help="torch.compile: a wait at first, then faster on a GPU")
    add("--seed", type=count, default=0, help="of weights, batches and masks")
    add("--eval_every", type=size, default=100, help="steps from one evaluation (and checkpoint) to the next")
    add("--eval_stride", type=size, help="rows from one test window to the next (None: seq_len // 4)")
    add("--log_every", type=size, default=10, help="steps from one log line to the next")
    add("--out_dir", default=f"out/{SCRIPT}", help="for checkpoints, log.csv, results.json and pictures")
    add("--resume", action="store_true", help="go on from out_dir/last.pt; flags given here override its own")


def pencil_error(table, args):
    """(N,) root mean squared error of what is pencilled in, on some train windows: the numeric loss's unit.

    So that loss starts near 1, says what share of the baseline's squared error is left, and a calm column
    weighs as much as a wild one. The floor is for constant columns, where there is no error to divide by.
    """
    N, generator, square, count = len(table.schema.numeric), step_generator(0), 0.0, 0
    # on train windows, as all statistics; on enough of them that a column with few cells has some
    batch = table.batch(table.sample("train", max(16, 2 * EVAL_ROWS // table.seq_len), generator))
    for case in eval_cases(args):
        inputs, targets = objective(batch, args, generator, case=case)
        score = targets.score[..., :N]                                          # (B, T, N)
        # the pencil is the model's guess before its first step
        square += torch.where(score, inputs.pencil - targets.numeric, 0.0).square().sum((0, 1))
        count += score.sum((0, 1))
    return (square / count.clamp(min=1)).sqrt().clamp(min=0.01)


@torch.no_grad()
def evaluate(model, table, split, stride, unit, args, autocast):
    """The model and every baseline on a whole split, the same windows and masks every time.

    Returns losses (2,), numeric and categorical, the mean over the cases; errors {method: (2, cases, F)},
    sums of absolute and of squared errors in scaled units, a wrong category counting 1; cells (cases, F), how
    many were scored; and how many lay beyond the clip and so were scored for nobody.
    """
    model.eval()                                    # no dropout, until the next step
    cases, beyond = eval_cases(args), 0
    errors = [{} for _ in cases]                    # of each case {method: (2, F)}
    # float64, for float32 cannot count beyond 16.8 million
    losses, cells = torch.zeros(2), torch.zeros(len(cases), table.observed.shape[1], dtype=torch.float64)
    for i, case in enumerate(cases):
        generator, sums, counts = step_generator(0, i), 0.0, 0.0        # of its own: the same masks always
        for windows in table.starts(split, stride).split(max(1, EVAL_ROWS // table.seq_len)):
            inputs, targets = objective(table.batch(windows), args, generator, case=case)
            inputs, targets = move(inputs, unit.device), move(targets, unit.device)
            # what was cut to the clip has lost its truth, so it is no question for anyone
            targets, n_outside = within_clip(targets, table.schema.clip)
            with autocast:
                guess = model(inputs)
            sums, counts = sums + sum_losses(guess, targets, unit, args.loss), counts + count_scored(targets)
            # baselines see the very inputs that the model saw, and answer for the same cells
            for name, said in {"model": (guess.numeric, guess.ids()), **baselines(inputs, args)}.items():
                tally(errors[i], name, *said, targets, dim=(0, 1))
            cells[i] += targets.score.sum((0, 1)).cpu()
            beyond += n_outside
        losses += (sums / counts.clamp(min=1)).cpu() / len(cases)
    errors = {name: torch.stack([e[name] for e in errors], dim=1) for name in errors[0]}    # (2, cases, F)
    return losses, errors, cells, beyond


def learning_rate(step, args):
    """Linear warmup that starts above 0, then a cosine from --lr to --min_lr at the last step."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - 1 - args.warmup_steps)      # 0 to 1
    low = min(args.min_lr, args.lr)                 # --lr 1e-5 is not meant to rise to --min_lr
    return low + (args.lr - low) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def write_log(history, args):
    """log.csv, a row a log step; `val` is the latest evaluation at or before it."""
    table = pd.DataFrame(history, columns=LOG)          # all of it each time: no file of two runs' lines
    replace_file(os.path.join(args.out_dir, "log.csv"), lambda path: table.to_csv(path, index=False))


def load_checkpoint(path):
    """Only tensors and plain Python are read (weights_only), so a checkpoint cannot run code."""
    if not os.path.exists(path):
        fail(f"{path}: no such checkpoint; --resume goes on from an earlier run with the same --out_dir")
    try:
        # first into main memory: a run that began on a GPU can go on without one
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        keys = {"script", "model", "optimizer", "scaler", "step", "best", "history", "args", "schema"}
        if keys <= set(checkpoint) and checkpoint["script"] == SCRIPT:
            return checkpoint
    except Exception:           # half a file and a foreign one raise half a dozen kinds of error
        pass
    fail(f"{path}: cannot be read as a checkpoint of {SCRIPT}.py")


def parse(argv):
    """Flags, and the checkpoint to go on from, or None. On --resume its flags become the defaults."""
    parser = get_parser()
    args, checkpoint = parser.parse_args(argv), None    # argv None: the command line
    if args.resume:
        checkpoint = load_checkpoint(os.path.join(args.out_dir, "last.pt"))
        # all but where it is: a folder may have been moved
        was = {name: value for name, value in checkpoint["args"].items() if name not in ("resume", "out_dir")}
        parser.set_defaults(**was)                      # a flag given now still wins
        args = parser.parse_args(argv)
        for name, value in was.items():
            if getattr(args, name) != value:
                print(f"--{name} {getattr(args, name)} overrides {value} of the checkpoint")
    return args, checkpoint


def pick_device(args):
    """Returns the device, and the name of autocast's dtype."""
    # a GPU is used where there is one, never required: the first command must run on a laptop
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if name == "cuda":                                  # each process of torchrun has a GPU of its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()            # asking is the only way to know
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {args.device} cannot be used here ({str(e).splitlines()[0]})")
    best = "float32"
    if device.type == "cuda":
        torch.cuda.set_device(device)                   # where NCCL works, too
        # the range of float32 with fewer digits, from Ampere on; before, float16, which needs its loss scaled
        best = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    return device, best if args.dtype == "auto" else args.dtype


def restore(checkpoint, model, optimizer, scaler, schema, args):
    """Put a checkpoint back, if it is one of this table and of this model."""
    path = os.path.join(args.out_dir, "last.pt")
    if checkpoint["schema"] != schema:
        fail(f"{path} was trained on another table than {args.data}: columns, scales or categories differ")
    for name in ("n_layer", "n_head", "n_embd"):        # --n_head changes no weight's shape, yet the model
        if getattr(args, name) != checkpoint["args"][name]:
            fail(f"{path} holds a model of another shape: --{name} must stay {checkpoint['args'][name]}")
    model.load_state_dict(checkpoint["model"])          # in place: the optimiser holds these tensors
    # what Adam remembers comes from the checkpoint, its settings from the flags
    optimizer.load_state_dict({**optimizer.state_dict(), "state": checkpoint["optimizer"]["state"]})
    if checkpoint["scaler"]:                            # empty unless float16 was used
        scaler.load_state_dict(checkpoint["scaler"])


def conclude(model, table, unit, args, autocast, history, facts):
    """The test split, read once, with the best weights: tables on the screen, results.json and pictures.
    Returns the mean error of each column in own units, {column: {method: error}}."""
    model.load_state_dict(load_checkpoint(os.path.join(args.out_dir, "best.pt"))["model"])
    stride = args.eval_stride or max(1, table.seq_len // 4)     # windows overlap: a cell is asked often
    # what is measured, whatever the objective ...
    _, errors, cells, beyond = evaluate(model, table, "test", stride, unit, args, autocast)
    # ... and what this objective makes of it
    kept, curve, drawn = examine(model, table, errors, cells, args)
    results = {"script": SCRIPT, "data": args.data, **facts, "seed": args.seed, **kept}
    replace_file(os.path.join(args.out_dir, "results.json"),
                 lambda path: Path(path).write_text(json.dumps(results, indent=1)))

    # a squared error in standard deviations means nothing to whoever reads the gauge: back to its units
    means = print_columns(errors, cells, table.schema)
    if beyond:
        print(f"beyond --clip {args.clip:g} and so scored for nobody, over all windows and rates: {beyond}")
    # after the tables and results.json: no error in a picture can lose a number
    draw_pictures(args.out_dir, table.schema, history, curve, drawn)
    return means


def main(argv=None):
    """Train, then judge on the test split. Returns the rows of log.csv."""
    args, checkpoint = parse(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # of torchrun
    device, dtype = pick_device(args)
    # weights stay float32; autocast does matrix products in a shorter type, and what needs range in float32
    autocast = nullcontext() if dtype == "float32" else torch.autocast(device.type, getattr(torch, dtype))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")      # else float16 underflows
    table = load_table(args)
    check(args, table)
    schema, n_numeric = asdict(table.schema), len(table.schema.numeric)
    unit = pencil_error(table, args).to(device)                                 # (N,) of the numeric loss
    weight = torch.tensor([1.0, args.category_weight], device=device)           # of the two losses
    # the model and its optimiser, new or as they were
    config = Config(n_numeric, table.schema.vocab_sizes(), table.clock.shape[1], table.seq_len,
                    args.n_layer, args.n_head, args.n_embd, args.dropout, CAUSAL)
    torch.manual_seed(args.seed)                        # the weights; the same on all ranks
    try:
        raw = TableTransformer(config).to(device)
    except ValueError as e:
        fail(str(e))
    # weight decay draws matrices towards 0, not biases and norms
    groups = [{"params": [p for p in raw.parameters() if p.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in raw.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    # fused: one kernel for all weights; 0.95, not 0.999: a memory of some 20 steps of squared gradients
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda"))
    step, best, val, history = 0, math.inf, math.nan, []
    if checkpoint:
        restore(checkpoint, raw, optimizer, scaler, schema, args)
        step, best, history = checkpoint["step"], checkpoint["best"], checkpoint["history"]
        val = history[-1]["val"] if history else val
    # `model` may be wrapped for speed; `raw` owns the weights and is what is evaluated and saved
    model = torch.compile(raw) if args.compile else raw
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    n_params = sum(p.numel() for p in raw.parameters())             # embeddings and heads included
    if rank == 0:                                       # one process speaks and writes for all
        try:
            os.makedirs(args.out_dir, exist_ok=True)
        except OSError as e:
            fail(f"--out_dir {args.out_dir} cannot be made ({e.strerror})")
        write_log(history, args)                        # on --resume: cut back to the checkpoint
        print(f"{args.data}: {len(table.observed):,} rows, {n_numeric} numeric and "
              f"{len(schema['categorical'])} categorical columns, windows of {table.seq_len} rows\n"
              f"{n_params:,} parameters on {device} in {dtype}, from step {step} to {args.max_steps}")

    def keep(name):
        """Save the run as it stands, and log.csv with it, so that the two always agree."""
        state = {"script": SCRIPT, "model": raw.state_dict(), "optimizer": optimizer.state_dict(),
                 "scaler": scaler.state_dict(), "step": step, "best": best, "history": history,
                 "args": vars(args), "schema": schema}
        replace_file(os.path.join(args.out_dir, name), lambda path: torch.save(state, path))
        write_log(history, args)

    def interrupt(*_):
        """The first Ctrl-C is noted, and the step brought to its end; the second is what it always was."""
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def prepare(step):
        """The micro-batches of a step, on the device, and which windows they are. They depend on seed, step
        and rank alone, so they can be made while a GPU is still at work on the step before."""
        generator = step_generator(args.seed, step, rank)
        windows = [table.sample("train", args.batch_size, generator) for _ in range(args.grad_accum)]
        micro = [objective(table.batch(w), args, generator, step) for w in windows]
        # a copy to a GPU waits for all that the GPU was told before: here, where we are about to wait anyway
        return [(move(inputs, device), move(targets, device)) for inputs, targets in micro], windows

    interrupted, code, ready = False, 0, None
    signal.signal(signal.SIGINT, interrupt)
    first = logged = step                               # where this run began, and the last log line
    began = since = time.perf_counter()                 # and when
    running = torch.zeros(2, device=device)             # losses since then; they stay on the device
    while True:
        # evaluate and save
        if rank == 0 and (step % args.eval_every == 0 or step >= args.max_steps):
            # `raw`, not `model`: no wrapper has a say in what is evaluated, and rank 0 may do it alone
            losses, errors, cells, _ = evaluate(raw, table, "val", table.seq_len, unit, args, autocast)
            val = float(losses @ weight.cpu())                  # what the training loss is made of, on val
            if history and history[-1]["step"] == step:
                history[-1]["val"] = val                        # the row was logged before we knew
            # errors[1] are the squared ones
            mse = {m: float((e[1, :, :n_numeric].sum(1) / cells[:, :n_numeric].sum(1).clamp(min=1)).mean())
                   for m, e in errors.items() if n_numeric}
            print(f"step {step:5d} | val loss {val:.4f}, numeric {losses[0]:.4f}, categorical {losses[1]:.4f}"
                  " | mse " + ", ".join(f"{m} {value:.4f}" for m, value in mse.items()))
            if val < best:                                      # never true of a NaN
                best = val
                keep("best.pt")                                 # what is judged at the end
            keep("last.pt")                                     # what --resume goes on from
        if step >= args.max_steps:
            code = 130 * interrupted                            # Ctrl-C during the last step counts
            break

        # one optimiser step
        model.train()                                           # dropout is on again
        for group in optimizer.param_groups:                    # no scheduler object: a number a step
            group["lr"] = learning_rate(step, args)
        torch.manual_seed(step_generator(args.seed, step, rank).initial_seed())         # for dropout
        micro, windows = ready or prepare(step)
        count = sum(count_scored(targets) for _, targets in micro)              # (2,) cells of the whole step
        count = torch.nn.functional.pad(count, (0, 1), value=float(interrupted))        # (3,)
        if world > 1:
            dist.all_reduce(count)                              # ... of all ranks; and was any interrupted?
        for i, (inputs, targets) in enumerate(micro):
            model.require_backward_grad_sync = i == len(micro) - 1      # gradients are averaged once a step
            with autocast:
                guess = model(inputs)
            # over the count of all micro-batches: they add up to the mean that one big batch would have
            losses = sum_losses(guess, targets, unit, args.loss) / count[:2].clamp(min=1)
            scaler.scale(losses @ weight * world).backward()    # ranks average, we want the sum
            running += losses.detach()                          # without its graph, which would stay alive
        scaler.unscale_(optimizer)                              # or the clipping would see scaled gradients
        # one strange batch must not undo the steps before it: a longer gradient is cut to this length
        norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), args.grad_clip or math.inf)
        ready = prepare(step + 1)                               # while a GPU is busy with what it was given
        # The one place where a step waits for the GPU, with the copies just made. The norm is that of the
        # gradients of all ranks together: all stop, or none.
        norm, stop = torch.stack([norm, count[2]]).tolist()
        # float16 overflows now and then, and the scaler halves its scale; below 1 the fault is the model's
        if not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < 1):
            if rank == 0:
                keep("last.pt")                                 # of the last good step
            if rank == 0 or not running.isfinite().all():       # whose batch was it?
                print(f"error: step {step}, rank {rank}: the gradient norm is {norm}; stopped before the "
                      f"step, so last.pt and best.pt in {args.out_dir} are sound",
                      *explain(raw, micro, windows, table, unit, args.loss, autocast), sep="\n  ",
                      file=sys.stderr)
            code = 1
            break
        scaler.step(optimizer)                                  # float16: leaves a non-finite step out ...
        scaler.update()                                         # ... and halves the scale
        optimizer.zero_grad(set_to_none=True)                   # frees the memory as well
        step += 1

        # log
        if step % args.log_every == 0 or step in (1, args.max_steps):
            if world > 1:
                dist.all_reduce(running)                        # each rank holds its share of the mean
            now, n = time.perf_counter(), step - logged         # steps since the last line
            # the mean over the steps since then; the loss of a single batch says little
            numeric, categorical = (running / n).tolist()
            # padding and holes included: what the machine works on
            n_cells = n * world * args.grad_accum * args.batch_size * table.seq_len * table.observed.shape[1]
            minutes = (args.max_steps - step) * (now - began) / (step - first) / 60
            row = dict(zip(LOG, (step, float(running @ weight) / n, numeric, categorical, val, group["lr"],
                                 norm, n_cells / (now - since))))
            history.append(row)                                 # goes to log.csv at the next evaluation
            if rank == 0:
                print(f"step {step:5d} | loss {row['train']:.4f}, numeric {numeric:.4f}, categorical "
                      f"{categorical:.4f} | lr {row['lr']:.1e}, norm {norm:.2f}, {row['cells_per_s']:,.0f} "
                      f"cells/s, {minutes:.1f} min left", flush=True)
            since, logged = now, step
            running.zero_()
        if stop:                                                # Ctrl-C on any rank: all stop at this step
            code = 130                                          # as the shell says of Ctrl-C
            break

    # the end: all asked for, stopped by Ctrl-C (130), or not finite (1)
    if code == 130 and rank == 0:
        keep("last.pt")                                         # as of this step, not of the last evaluation
        print(f"stopped at step {step}; go on: python {SCRIPT}.py --resume --out_dir {args.out_dir}")
    signal.signal(signal.SIGINT, signal.default_int_handler)    # from here on Ctrl-C is what it always was
    if world > 1:
        # All leave together, and the wrapper is freed before its process group: freed after it, it would hold
        # Python's lock while the group's own thread waits for that lock
        dist.barrier()
        model = None
        dist.destroy_process_group()
    if code:
        raise SystemExit(code)
    if rank == 0:                                               # the others have left; the test split is read
        facts = {"steps": step, "seconds": round(time.perf_counter() - began, 1), "n_params": n_params}
        means = conclude(raw, table, unit, args, autocast, history, facts)
        apply_to_file(raw, table, means, args)
    return history


if __name__ == "__main__":
    main()
