"""
Autoregression on a table that changes over time: see the rows so far, learn to say what comes next.

    python train_ar.py                                      # simulated planets, minutes on two cores
    python train_ar.py --noise 0                            # the mistake of training on true rows alone
    python train_ar.py --data my.csv --given 72             # your own file; 72 rows before a roll-out
    python train_ar.py --data my.csv --given 72 --season 24     # one more rival: the value of 24 rows ago
    python train_ar.py --data my.csv --forecast 48 --to next.csv    # and write the 48 rows that come next
    python train_ar.py --resume --max_steps 4000            # go on from out/train_ar/last.pt
    torchrun --standalone --nproc_per_node=2 train_ar.py    # two processes, or two GPUs

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

from data import (Cells, check_target, draw_pictures, fail, load_table, make_parser, number, replace_file,
                  step_generator)
from masking import Targets, create_inputs, jitter, move, scorable
from model import (Config, TableTransformer, count_scored, explain, judge, print_columns, print_table,
                   sum_losses, tally, within_clip)

SCRIPT = "train_ar"

# -----------------------------------------------------------------------------
# the knobs of this objective; those of the loop are below, in add_loop_arguments

def get_parser():
    parser = make_parser(__doc__, SCRIPT, "planets")
    size = number(int, 1)

    add = parser.add_argument_group("objective").add_argument
    # who rolls out goes on from its own rows, so training should meet rows that are slightly off
    add("--noise", type=number(float, 0), default=0.05,
        help="on the numbers seen in training, as a share of their step from the row before")
    add("--given", type=size, default=10, help="rows of a test window that a roll-out starts from")
    add("--horizons", type=size, nargs="+", default=[1, 5, 10, 19],
        help="steps ahead at which a roll-out is judged")
    add("--season", type=size, help="a further baseline: the value of so many rows ago (None: without it)")
    add("--forecast", type=size, help="rows to write at the end, those that come next in each sequence ...")
    add("--to", metavar="FILE", help="... to this .csv")
    # 0.03: at 1 the gradient of the categories drowns that of the places (README)
    add("--category_weight", type=number(float, 0), default=0.03,
        help="of the categorical cells' loss beside the numeric cells'")

    add_loop_arguments(parser, max_steps=2000)
    return parser


def roll_out_windows(table, args):
    """Windows of the test split that hold the rows given and the rows asked for, as in Table.starts. In a
    single sequence the given ones may lie before the test rows; what is asked never does."""
    single = len(table.segments["all"]) == 1                # then the split begins seq_len rows early
    windows = table.starts("test", args.eval_stride or max(1, table.seq_len // 4))
    windows = windows + torch.tensor([table.seq_len - args.given if single else 0, 0])
    # the last ones may be too near to the end of their sequence to be judged
    return windows[windows[:, 1] - windows[:, 0] >= args.given + max(args.horizons)]


def check(args, table):
    """What no flag can know alone."""
    if (args.season or 1) > args.given:
        fail(f"--season {args.season} looks back further than a roll-out's --given {args.given} rows")
    # a roll-out is judged, so the rows after it must be there; --forecast, further down, is not
    if args.given + max(args.horizons) > table.seq_len or len(roll_out_windows(table, args)) == 0:
        fail(f"--given {args.given} rows and --horizons up to {max(args.horizons)} do not fit into windows "
             f"of {table.seq_len} rows (--seq_len), or into the test split; --given 3 --horizons 3 is less")
    if bool(args.forecast) != bool(args.to):
        fail("--forecast (how many rows) and --to (into which file) go together")
    if args.forecast:                       # now, not after minutes of training
        check_target("--to", args.to, args.data)
        for name in table.keys:                             # the time column
            step = table.facts[name][2]                     # a number or a Timedelta, NaN of a single row
            if not step > 0 * step:
                fail(f"{args.data}: --forecast cannot go on from {name!r}, whose median step is {step}; does "
                     "another column tell sequences (--group_col) or the time of day apart?")


# -----------------------------------------------------------------------------
# your own file: the rows that come next

def apply_to_file(model, table, means, args):
    """--forecast: write the rows that come next in each sequence. means: the twin's --fill prints them."""
    if not args.forecast:
        return
    schema, steps = table.schema, args.forecast
    start, end = table.segments["all"].unbind(1)
    windows = torch.stack([torch.maximum(start, end - table.seq_len), end], dim=1)      # the last of each
    keys, clock = table.coming(steps)                       # a row of keys for each row to come
    parts = [model.rollout(table.batch(w), c, steps) for w, c in zip(windows.split(256), clock.split(256))]
    rows = type(parts[0])(*(torch.cat(x).flatten(0, 1) for x in zip(*parts)))   # (sequences * steps, ...)
    # the columns of the file, each in its own manner; empty if the model has not seen it
    cells, text = Cells(table, args), pd.DataFrame("", range(len(keys)), list(table.kinds))
    for name, said, there in zip(schema.numeric + schema.categorical, [*rows.numeric.T, *rows.categorical.T],
                                 (rows.observed & table.learnt()).T):           # (sequences * steps,)
        if there.any():                                     # else there is no manner to write it in
            text.loc[there.numpy(), name] = cells.like(name, said[there])       # no planet that was not there
    for name in keys:
        text[name] = cells.stamps(name, keys[name]).to_numpy()
        print(f"\n{name} goes on at its median step, {table.facts[name][2]}, "
              f"from {keys[name].min()} to {keys[name].max()}")
    for name in [name for name, kind in table.kinds.items() if kind == "group"]:
        text[name] = cells.text.loc[keys.index, name].to_numpy()        # as in the last row of its sequence
    replace_file(args.to, lambda path: cells.write(path, text))
    print(f"wrote {args.to}: {steps} rows of each of {len(windows)} sequence(s)")


# -----------------------------------------------------------------------------
# THE OBJECTIVE: say what comes next

CAUSAL = True           # who may look where: every row of a window at itself and at those before it


def objective(batch, args, generator, step=None, case=None):
    """data.Batch -> what the model sees, masking.Inputs, and what it is asked, masking.Targets.

    Every row is asked for the row after it. In training, without `case`, what is seen is slightly off.
    """
    answerable = scorable(batch.observed, batch.categorical)                    # has a right answer
    noise = args.noise if case is None else 0.0
    numeric = jitter(batch.numeric, batch.observed[..., :batch.numeric.shape[-1]], noise, generator)
    # nothing is hidden but the future, and that by `CAUSAL` alone
    inputs = create_inputs(batch._replace(numeric=numeric), batch.observed, CAUSAL)
    # the target of row t is row t + 1; the last row has none, and padding is not observed
    numeric, categorical, score = (x.roll(-1, dims=1) for x in (batch.numeric, batch.categorical, answerable))
    score[:, -1] = False
    return inputs, Targets(numeric, categorical, score)


def eval_cases(args):
    return ["next row"]


def baselines(inputs, args):
    """What one would say comes next without a model: {name: (numbers (B, T, N), ids (B, T, K))}."""
    last, ids, rows = inputs.pencil, inputs.pencil_ids.clamp(min=2), torch.arange(inputs.numeric.shape[1])
    said = {"last": (last, ids), "linear": (2 * last - last[:, (rows - 1).clamp(min=0)], ids)}
    if args.season:                                 # of the next row; if before the window, the last value
        ago = torch.where(rows + 1 < args.season, rows, rows + 1 - args.season)
        said["season"] = last[:, ago], ids[:, ago]
    return said


def examine(model, table, errors, cells, args):
    """Print what the test split comes to. Returns what results.json keeps of it; a curve to draw, as the name
    of its axis, the cases along it and {method: means}; and windows to draw, as a Batch, which of its cells
    had to be guessed, (B, T, F) bool, and {method: guesses (B, T, N)}."""
    schema, steps, sums = table.schema, max(args.horizons), {}
    windows = roll_out_windows(table, args)
    windows = windows[::1 + len(windows) * (args.given + steps) // 16_384]      # every n-th: 16,384 rows fit
    batch = table.batch(windows).rows(0, args.given + steps)
    given, future = batch.rows(0, args.given), batch.rows(args.given, None)
    said = {name: model.rollout(given, future.clock, steps, None if name == "model" else
                                lambda inputs: baselines(inputs, args)[name]) for name in errors}
    targets = Targets(future.numeric, future.categorical, scorable(future.observed, future.categorical))
    targets, _ = within_clip(targets, schema.clip)
    for name, rows in said.items():
        tally(sums, name, rows.numeric, rows.categorical, targets, dim=0)       # (2, steps, F): a case a step
    places = [j for j, c in enumerate(schema.numeric) if args.data == "planets" and c[-2:] in ("_x", "_y")]
    one, ahead = (judge(*sums, schema, places) for sums in ((errors, cells), (sums, targets.score.sum(0))))
    print_table("mean squared error, scaled", {"next row": 0}, one, "mse")
    print_table("accuracy of categories", {"next row": 0}, one, "accuracy")
    horizons = {f"{h} ahead": h - 1 for h in args.horizons}
    print_table(f"rolled out from row {args.given}", horizons, ahead, "mse")
    test = {name: {"next_mse": one[name]["mse"][0], "next_accuracy": one[name]["accuracy"][0],
                   "rollout_mse": [ahead[name]["mse"][h - 1] for h in args.horizons]} for name in errors}
    asked = (torch.arange(args.given + steps) >= args.given)[None, :, None].expand_as(batch.observed)
    guesses = {name: torch.cat([given.numeric, rows.numeric], dim=1) for name, rows in said.items()}
    some = slice(len(windows) // 2, len(windows) // 2 + 3)
    return ({"horizons": args.horizons, "test": test}, ("rows ahead", range(1, steps + 1), ahead),
            (type(batch)(*(x[some] for x in batch)), asked[some], {m: x[some] for m, x in guesses.items()}))


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
