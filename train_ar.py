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
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import (Batch, Schema, add_errors, add_loop_flags, check_target, draw_lines, draw_windows, fail,
                  find_hints, load_checkpoint, load_table, make_parser, mean_errors, next_rows, number,
                  own_errors, parse, pick_device, print_errors, print_table, read_text, replace_file,
                  step_generator, write_cells, write_text)
from masking import (Targets, autoregress, fit_closed_form, jitter, mix_up, move, scorable,
                     within_clip)
from model import Config, TableTransformer, count_scored, explain_non_finite, sum_losses

SCRIPT = "train_ar"
CAUSAL = True           # who may look where: every row of a window at itself and at those before it

# ---- the knobs of this objective

def get_parser():
    parser = make_parser(__doc__, SCRIPT, "planets")
    add = parser.add_argument
    size = number(int, 1)
    # a roll-out goes on from rows that are slightly off: so does training, or it will not know how
    add("--noise", type=number(float, 0), default=0.05,
        help="on the numbers seen in training, as a share of their step from the row before")
    add("--mixup", type=number(float, 0, 1), default=0.0, help="up to this share of a window is another's")
    add("--base", choices=["closed", "last"],
        help="what the model corrects: the closed form, or the last value (None: the last value for three "
             "and more groups, which may each have a law of its own)")
    add("--given", type=size, default=10, help="rows of a test window that a roll-out starts from")
    add("--horizons", type=size, nargs="+", default=[1, 5, 10, 19],
        help="steps ahead at which a roll-out is judged")
    add("--season", type=size, help="a further baseline: the value of so many rows ago (None: without it)")
    # 0.03: at 1 the gradient of the categories drowns that of the places (README)
    add("--category_weight", type=number(float, 0), default=0.03, help="of their loss beside numbers'")
    add("--forecast", type=size, help="rows to write at the end, those that come next in each sequence ...")
    add("--to", metavar="FILE", help="... to this .csv")
    add_loop_flags(add, SCRIPT, max_steps=2000)
    parser.set_defaults(lr=3e-3)
    return parser


# ---- THE OBJECTIVE: say what comes next

def objective(batch, args, generator, step=None, case=None):
    """data.Batch -> what is shown of it, a Batch whose `observed` is what is known, and what is asked,
    Targets. Every row is asked for the row after it. In training, without `case`, what is seen is noisy."""
    training = case is None
    if training and args.mixup:
        batch = mix_up(batch, args.mixup, generator)
    shown = jitter(batch, args.noise, generator) if training else batch
    # the target of row t is row t + 1; the last row has none, and padding is not observed
    row = Targets(batch.numeric, batch.categorical, scorable(batch))
    targets = Targets._make(x.roll(-1, dims=1) for x in row)
    targets.score[:, -1] = False
    return shown, targets


def eval_cases(args):
    """{(kind, name): case of `objective`}: there is one, without noise."""
    return {("next", "next row"): "next row"}


def baselines(inputs, args, closed_form=None):
    """What one would say comes next without training: {name: (numbers (B, T, N), ids (B, T, K))}."""
    last = inputs.numeric                                                       # (B, T, N)
    ids = inputs.categorical                                                    # (B, T, K)
    before = torch.cat([last[:, :1], last[:, :-1]], dim=1)                      # the row before each
    answers = {"last": (last, ids), "linear": (2 * last - before, ids)}
    if args.season:                                 # what was --season rows before the next row, if known
        rows = torch.arange(last.shape[1])                  # (T,)
        ago = torch.where(rows + 1 < args.season, rows, rows + 1 - args.season)
        answers["season"] = (last[:, ago], ids[:, ago])
    if closed_form is not None:
        answers["ar"] = (autoregress(last, closed_form), ids)
    return answers


# ---- what is done with the result

def rollout_windows(table, split, args):
    """Windows of a split that begin with the rows given, as in Table.starts, and how many rows come after
    those, (n,). Where time is split the given ones may lie before the split, what is asked never does."""
    windows = table.starts(split, args.eval_stride)         # (n, 2)
    if len(table.segments["all"]) < 3:                      # then the split begins seq_len rows early
        windows = windows + torch.tensor([table.seq_len - args.given, 0])
    length = windows[:, 1] - windows[:, 0]
    return windows, length.clamp(max=table.seq_len) - args.given


def judge_rollout(model, table, split, steps, args):
    """Three Batches, of the rows given, of the `steps` rows after them, and of what the model says of those;
    and how far off it is, (B, steps, F): |error|, 1 for a wrong category, NaN where there is no answer."""
    windows, rows_after = rollout_windows(table, split, args)
    windows = windows[rows_after >= steps]                  # those with so many to compare
    end = args.given + steps
    windows = windows[::1 + len(windows) * end // 16_384]   # every n-th: 16,384 rows fit into memory
    batch = table.batch(windows)
    given = batch.rows(0, args.given)
    asked = batch.rows(args.given, end)
    ahead = model.rollout(given, asked.clock)               # by its own words, row by row
    error = (ahead.numeric - asked.numeric).abs()                               # (B, steps, N)
    wrong = ahead.categorical != asked.categorical                              # (B, steps, K)
    off = torch.cat([error, wrong], dim=-1).masked_fill(~asked.observed, math.nan)
    return given, asked, ahead, off


def fit_trust(model, table, args):
    """Set the share of the model's correction that is used in roll-outs to what val likes best; with 0 the
    base goes on alone. What is better for one row can be worse after twenty."""
    N = len(table.schema.numeric)
    errors = {}                                             # share -> mean squared error on val
    for share in (1.0, 0.75, 0.5, 0.25, 0.0):
        model.trust = share
        *_, off = judge_rollout(model, table, "val", max(args.horizons), args)
        square = off[..., :N].clamp(max=args.clip).square()                     # no spike decides
        errors[share] = float(square.nanmean())
    model.trust = min(errors, key=errors.get)               # of equals the larger share
    print(f"\nrolled out, {model.trust:.0%} of the model's correction is used, which val likes best")


def fit_horizons(model, table, steps, args):
    """How sure a roll-out is, from val, by rows ahead and column, two (steps, F): half the width within which
    --coverage of its numbers lie (Stankeviciute 2021), 0 for categories; and the chance that it is right."""
    N = len(table.schema.numeric)
    *_, off = judge_rollout(model, table, "val", steps, args)
    half = off.nanquantile(args.coverage, dim=0)            # (steps, F)
    half = torch.where(half.isnan(), math.inf, half)        # val has no such value: anything may come
    half[:, N:] = 0.0
    chance = 1 - off.nanmean(dim=0)                         # of a category, the share that val got right
    chance[:, :N] = args.coverage
    return half, chance


def prepare(table, args):
    """What no flag can know alone, and what must not go wrong after minutes of training. Returns the rows to
    come, without their values, and their clock; or None."""
    if args.base is None:
        args.base = "closed" if len(table.segments["all"]) < 3 else "last"
    if (args.season or 1) > args.given:
        fail(f"--season {args.season} looks back further than a roll-out's --given {args.given} rows")
    if bool(args.forecast) != bool(args.to) or args.intervals and not args.to:
        fail("--forecast (how many rows) and --to (into which file) go together, --intervals is one more")
    _, val = rollout_windows(table, "val", args)
    _, test = rollout_windows(table, "test", args)
    room = int(min(val.max(), test.max()))
    args.horizons = [h for h in args.horizons if h <= room]     # a short table is judged at what fits
    if not args.horizons or args.intervals and args.forecast > room:
        fail(f"{room} rows after --given {args.given} fit into windows of --seq_len {table.seq_len}, val and "
             "test: too few for --horizons, or for --forecast with --intervals")
    if not args.forecast:
        return None
    check_target("--to", args.to, args.data)                # the text is read and the stamps
    check_target("--intervals", args.intervals, args.data, args.to)     # made before the first step
    text = read_text(table, args)
    return text, *next_rows(table, text, args.forecast, args)


def report_test(model, table, errors, factor, args):
    """Tables of the next row and of a roll-out, and a picture of it. Returns what results.json keeps."""
    schema = table.schema
    numbers = schema.numeric                                # the columns that the tables count
    if args.data == "planets":                              # what never changes is left out, and easy
        numbers = [name for name in numbers if name[-2:] in ("_x", "_y")]
    fit_trust(model, table, args)
    longest = max(args.horizons)
    given, asked, ahead, off = judge_rollout(model, table, "test", longest, args)    # off (B, longest, F)
    answers = {"model": ahead}                              # {name: Batch of the rows to come}
    for name in baselines(model.inputs(given), args, model.closed_form):
        predict = lambda inputs: baselines(inputs, args, model.closed_form)[name]
        answers[name] = model.rollout(given, asked.clock, predict)
    lines = [errors]
    for i in range(longest):
        row = asked.rows(i, i + 1)
        said = {name: rows.rows(i, i + 1)[:2] for name, rows in answers.items()}        # numbers and ids
        truth = Targets(row.numeric, row.categorical, scorable(row))
        truth = within_clip(truth, row.numeric, args.clip)
        add_errors(lines, "rollout", i + 1, schema, truth, said)
    errors = pd.concat(lines)                               # of the next row, and of each row ahead
    errors = errors[errors["column"].isin(numbers + schema.categorical)]
    rollout = errors[errors["kind"] == "rollout"]
    next_row = print_errors("next row", errors[errors["kind"] == "next"], schema)
    rolled = print_errors(f"rolled out from row {args.given}, rows ahead", rollout, schema, args.horizons)
    curve = mean_errors(rollout, schema.numeric, "square", "case").T    # a line a row ahead
    draw_lines(f"{args.out_dir}/errors.png", curve, "rows ahead", "mean squared error, scaled")
    half, _ = fit_horizons(model, table, longest, args)     # from val, judged on test
    inside = (off <= half).sum(dim=0) / off.isfinite().sum(dim=0)               # (longest, F)
    inside = pd.DataFrame(inside.T, schema.numeric + schema.categorical, range(1, longest + 1))
    print_table(f"rolled out, intervals of {args.coverage}: share of test cells inside, rows ahead",
                inside.loc[numbers, args.horizons])
    draw_rollout(schema, given, asked, answers, half, args)
    test = {}
    for name, own in next_row.items():
        mse = rolled[name]["mse"]
        test[name] = {"next_mse": own["mse"][0], "next_accuracy": own["accuracy"][0],
                      "rollout_mse": [mse[h - 1] for h in args.horizons]}
    return {"horizons": args.horizons, "test": test}


def draw_rollout(schema, given, asked, answers, half, args):
    """A picture of three windows of report_test: what was given, what came, what was said, {name: Batch}."""
    some = slice(len(given.valid) // 2, len(given.valid) // 2 + 3)
    batch = Batch._make(torch.cat(pair, dim=1)[some] for pair in zip(given, asked))
    later = 0, 0, args.given, 0                             # of the rows given nothing is said, or drawn
    is_asked = F.pad(asked.observed[some], later)                               # (3, T, F)
    guesses = {name: F.pad(rows.numeric[some], later) for name, rows in answers.items()}
    width = F.pad(half[:, :len(schema.numeric)], later)     # of the band, to each side: (T, N)
    band = torch.stack([guesses["model"] - width, guesses["model"] + width])    # (2, 3, T, N)
    draw_windows(f"{args.out_dir}/window.png", schema, batch, is_asked, guesses, band)


def write_result(model, table, prepared, errors, factor, args):
    """--forecast: the rows that come next in each sequence; --intervals: and how sure each is."""
    text, rows, clock = prepared
    start, end = table.segments["all"].unbind(1)
    length = (end - start).clamp(max=table.seq_len)         # of the last window of each
    windows = torch.stack([end - length, end], dim=1)
    said = torch.zeros(4, len(length), args.forecast, table.observed.shape[1])      # as Prediction.interval
    for n in length.unique().tolist():                      # histories of equal length go together
        for some in (length == n).nonzero()[:, 0].split(256):
            given = table.batch(windows[some]).rows(0, n)   # without padding
            ahead = model.rollout(given, clock[some])
            cells = torch.cat([ahead.numeric, ahead.categorical], dim=-1)
            said[:3, some] = cells.masked_fill(~ahead.observed, math.nan)       # no planet that was not there
    if args.intervals:
        half, chance = fit_horizons(model, table, args.forecast, args)          # (steps, F) each
        said[1] -= half
        said[2] += half
        said[3] = chance
    said = said.flatten(1, 2)                               # (4, rows, F)
    lines = []
    for j, name in enumerate(table.schema.numeric + table.schema.categorical):
        here = said[0, :, j].isfinite().nonzero()[:, 0].numpy()     # new rows that get a value
        if not table.schema.learnt[j] or len(here) == 0:
            print(f"{name} is left empty: it has no value in the last rows, or in the train rows")
        else:
            cells = said[:, here, j]                        # (4, n)
            lines.append(write_cells(rows, here, name, cells, table, text, args, forecast=True))
    write_text(args.to, rows, lines, args)


# ---- from here to the end train_mlm.py and train_ar.py are the same, line for line ----

def get_lr(step, args):
    """Linear warmup that starts above 0, then a cosine from --lr to --min_lr at the last step."""
    # Adam's averages are worth little before they have seen some steps
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    min_lr = min(args.min_lr, args.lr)                      # --lr 1e-5 is not meant to rise
    progress = (step - args.warmup_steps) / max(1, args.max_steps - 1 - args.warmup_steps)  # 0 to 1
    coeff = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))          # from 1 to 0
    return min_lr + coeff * (args.lr - min_lr)


def make_example(model, batch, args, generator, step=None, case=None):
    """data.Batch -> what the model sees of what is shown of it (Inputs), and what is asked (Targets)."""
    shown, targets = objective(batch, args, generator, step, case)  # the one line about the objective
    inputs = model.inputs(shown)                            # with the base, without a hidden value
    return inputs, within_clip(targets, inputs.base, args.clip)                 # what is beyond is not asked


def measure_base(model, table, args):
    """(N,) root mean squared error of the base on some train windows, the unit of the numeric loss: it says
    what share of the base's error is left, and a calm column weighs as much as a wild one."""
    generator = step_generator(0)                           # whatever --seed is: losses compare
    batch = table.batch(table.sample("train", 64, generator))
    lines = []
    for (kind, name), case in eval_cases(args).items():
        inputs, targets = make_example(model, batch, args, generator, case=case)  # as evaluation asks
        answers = {"base": (inputs.base, inputs.categorical)}       # judged as every rival is
        add_errors(lines, kind, name, table.schema, targets, answers)
    square = mean_errors(pd.concat(lines), table.schema.numeric, "square", "column").loc["base"]
    rmse = square[table.schema.numeric].fillna(0.0) ** 0.5  # NaN: nothing was asked
    return torch.tensor(rmse.to_numpy()).float().clamp(min=0.01)        # a constant column has no error


@torch.no_grad()
def evaluate(model, table, split, stride, base_rmse, args, autocast):
    """The model and every baseline on a whole split, the same windows and masks every time. Returns the mean
    losses, (3,); the summed errors, see data.add_errors; and for each number asked its |error| / scale."""
    model.eval()                                            # no dropout, until the next step
    losses = torch.zeros(3)                                 # of numbers, categories, scales
    lines = []
    cells = []
    cases = eval_cases(args)
    for i, ((kind, name), case) in enumerate(cases.items()):
        generator = step_generator(0, i)                    # of its own: the same masks always
        sums = torch.zeros(3)                               # of losses, divided once at the end:
        counts = torch.zeros(3)                             # batches ask for more or fewer cells
        for windows in table.starts(split, stride).split(32):
            batch = table.batch(windows)
            inputs, targets = make_example(model, batch, args, generator, case=case)
            with autocast:
                prediction = model.predict(inputs)
            sums += sum_losses(prediction, targets, base_rmse.cpu(), args.loss)
            counts += count_scored(targets)
            # baselines see what the model saw, and answer for the same cells
            answers = {"model": prediction.answer(), **baselines(inputs, args, model.closed_form)}
            add_errors(lines, kind, name, table.schema, targets, answers)
            ratio = (prediction.numeric - targets.numeric).abs() / prediction.scale     # (B, T, N)
            score = targets.score[..., :ratio.shape[-1]]
            cells.append(pd.DataFrame({"kind": kind, "column": score.nonzero()[:, 2],
                                       "ratio": ratio[score], "scale": prediction.scale[score]}))
        losses += sums / counts.clamp(min=1) / len(cases)   # a case asked for little weighs as much
    return losses, pd.concat(lines), pd.concat(cells)


def fit_intervals(val, test, schema, args):
    """(N,) by which factor of its scale --coverage of a column's errors on val are off at most (conformal
    prediction, Vovk 2005). val, test: cells of `evaluate`; prints how that goes on test."""
    factor = val.groupby("column")["ratio"].quantile(args.coverage)     # 0.9: nine of ten are nearer
    factor = factor.reindex(range(len(schema.numeric)), fill_value=1.0)     # val had no cell of it
    test = test.assign(inside=test["ratio"] <= test["column"].map(factor))  # cells it has not seen
    means = test.groupby(["column", "kind"])["inside"].mean().unstack()
    means["width"] = 2 * factor * test.groupby("column")["scale"].mean() * schema.scale  # low to high
    print_table(f"intervals of {args.coverage}: share of test cells inside, and mean width, own units",
                means.rename(index=dict(enumerate(schema.numeric))))
    return torch.tensor(factor.to_numpy()).float()


def build_model(table, args, checkpoint, device):
    """The model and its optimiser, new or as they were in the checkpoint."""
    schema = table.schema
    closed_form = checkpoint["closed_form"] if checkpoint else fit_closed_form(table, CAUSAL)
    config = Config(n_numeric=len(schema.numeric), vocab_sizes=schema.vocab_sizes(), causal=CAUSAL,
                    n_clock=table.clock.shape[1], seq_len=table.seq_len, clip=args.clip,
                    n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, dropout=args.dropout,
                    closed=args.base == "closed" and closed_form is not None)
    torch.manual_seed(args.seed)                            # the weights; the same on all ranks
    model = TableTransformer(config, closed_form).to(device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]      # and embeddings
    vectors = [p for p in model.parameters() if p.dim() < 2]            # biases, norms: not drawn to 0
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda"))
    if checkpoint:
        for name, value in checkpoint["config"].items():
            if name not in ("dropout", "clip") and getattr(config, name) != value:
                fail(f"{args.out_dir}/last.pt holds a model of another shape: {name} must stay {value}")
        model.load_state_dict(checkpoint["model"])
        # what Adam remembers comes from the checkpoint, its settings from the flags
        kept = {"state": checkpoint["optimizer"]["state"]}  # its averages of gradients
        optimizer.load_state_dict(optimizer.state_dict() | kept)
    return model, optimizer


def conclude(model, table, base_rmse, args, autocast, history):
    """The test split, read once, with the best weights. Returns its errors, and the factor of intervals."""
    model.load_state_dict(load_checkpoint(f"{args.out_dir}/best.pt", SCRIPT)["model"])  # val's best
    _, _, val = evaluate(model, table, "val", table.seq_len, base_rmse, args, autocast)  # fits intervals
    _, errors, test = evaluate(model, table, "test", args.eval_stride, base_rmse, args, autocast)
    factor = fit_intervals(val, test, table.schema, args)
    results = {"script": SCRIPT, "data": args.data, "seed": args.seed, "n_params": model.n_params,
               "steps": args.max_steps, **report_test(model, table, errors, factor, args)}
    text = json.dumps(results, indent=1)
    replace_file(f"{args.out_dir}/results.json", lambda path: Path(path).write_text(text))
    print_table("mean absolute error, own units", own_errors(errors, table.schema).dropna())
    log = pd.DataFrame(history, columns=["step", "train", "val"]).set_index("step")
    draw_lines(f"{args.out_dir}/loss.png", log, "step", "loss")
    return errors, factor


def main(argv=None):
    """Train, then judge on the test split. Returns the rows of log.csv."""
    args, checkpoint = parse(get_parser(), argv, SCRIPT)    # --resume: the flags of the checkpoint
    rank = int(os.environ.get("RANK", 0))                   # one process, or one of several of torchrun
    world = int(os.environ.get("WORLD_SIZE", 1))            # how many processes
    device, dtype = pick_device(args)                       # cuda where there is one, else cpu
    # weights stay float32; autocast does matrix products in a shorter type
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # or it underflows
    if checkpoint:
        scaler.load_state_dict(checkpoint["scaler"])        # it has found a scale that works

    table = load_table(args, schema=checkpoint and Schema(**checkpoint["schema"]))
    args.seq_len = table.seq_len                            # a short table has shorter windows
    args.eval_stride = args.eval_stride or max(1, table.seq_len // 4)   # of test: each cell comes four times
    prepared = prepare(table, args)                         # what is to be written at the end
    raw, optimizer = build_model(table, args, checkpoint, device)
    base_rmse = measure_base(raw, table, args).to(device)                       # (N,)
    # of the losses; only the scale head learns from the third: Adam undoes 1e-3, clipping hardly sees it
    weight = torch.tensor([1.0, args.category_weight, 1e-3], device=device)
    # `model` may be wrapped, to be faster or shared; `raw` owns the weights, is evaluated and saved
    model = torch.compile(raw) if args.compile else raw
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)    # averages gradients over ranks
    if rank == 0:                                           # one process speaks and writes for all
        print(f"{args.data}: {len(table.observed)} rows, {raw.n_params:,} parameters, {device} {dtype}")
        for hint in find_hints(table, args):
            print("hint:", hint)
    kept = checkpoint or {}                                 # where the run begins, or goes on
    step = kept.get("step", 0)
    best = kept.get("best", math.inf)                       # lowest val loss so far
    history = kept.get("history", [])                       # rows of log.csv
    val = math.nan                                          # not known until the first evaluation

    def save(name):
        state = {"script": SCRIPT, "args": vars(args), "schema": asdict(table.schema),
                 "config": asdict(raw.config), "closed_form": raw.closed_form, "step": step,
                 "best": best, "history": history, "model": raw.state_dict(),
                 "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        replace_file(f"{args.out_dir}/{name}", lambda path: torch.save(state, path))
        replace_file(f"{args.out_dir}/log.csv", lambda path: pd.DataFrame(history).to_csv(path, index=False))

    start = time.perf_counter()                             # of this process, not of the run
    while True:
        # evaluate and save
        if rank == 0 and (step % args.eval_every == 0 or step >= args.max_steps):
            losses, errors, _ = evaluate(raw, table, "val", table.seq_len, base_rmse, args, autocast)
            val = float(losses[:2] @ weight[:2].cpu())      # without the loss of the scales
            if history and history[-1]["step"] == step:
                history[-1]["val"] = val                    # the row was logged before we knew
            mse = mean_errors(errors, table.schema.numeric, "square", "kind").mean(axis=1)
            print(f"step {step:5d} | val loss {val:.4f} | mse", mse.round(4).to_dict())
            if step > kept.get("step", -1):                 # else the checkpoint has it all
                if val < best:                              # never true of a NaN
                    best = val
                    save("best.pt")                         # what is judged at the end
                save("last.pt")                             # what --resume goes on from
        if step >= args.max_steps:
            break

        # one optimiser step; batches and masks depend on seed, step and rank alone, so a run that was
        # resumed sees what it would have seen
        model.train()                                       # evaluation has turned dropout off
        lr = get_lr(step, args)                             # set by hand: no scheduler to save
        for group in optimizer.param_groups:
            group["lr"] = lr
        generator = step_generator(args.seed, step, rank)
        torch.manual_seed(generator.initial_seed())         # for dropout
        windows = [table.sample("train", args.batch_size, generator) for _ in range(args.grad_accum)]
        examples = [make_example(raw, table.batch(w), args, generator, step=step) for w in windows]
        count = sum(count_scored(targets) for _, targets in examples).to(device)     # (3,)
        if world > 1:
            dist.all_reduce(count)                          # scored cells of the whole step
        loss = torch.zeros(3, device=device)                # for the log
        for inputs, targets in examples:
            with autocast:
                prediction = model(move(inputs, device))
            # over the count of all micro-batches: they add up to the mean of one big batch
            sums = sum_losses(prediction, move(targets, device), base_rmse, args.loss)
            losses = sums / count.clamp(min=1)
            scaler.scale(losses @ weight * world).backward()            # ranks average, we want the sum
            loss += losses.detach()                         # without its graph, which would stay alive
        scaler.unscale_(optimizer)                          # or the clipping would see scaled gradients
        # float16 overflows now and then, and its scaler leaves the step out; its scale is 1 without float16
        try:
            norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), args.grad_clip,
                                                  error_if_nonfinite=scaler.get_scale() <= 1)
        except RuntimeError:                                # stop BEFORE the step: the weights are sound
            if rank == 0:
                save("last.pt")
            why = explain_non_finite(raw, examples, windows, table.schema.numeric)
            print(f"error: step {step}, rank {rank}: the gradient norm is not finite; stopped before the "
                  f"step, last.pt and best.pt in {args.out_dir} are sound", *why, sep="\n  ", file=sys.stderr)
            raise SystemExit(1)
        scaler.step(optimizer)                              # left out if float16 overflowed
        scaler.update()                                     # a smaller scale then, else in time a larger
        optimizer.zero_grad(set_to_none=True)               # gradients add up until told not to
        step += 1

        # log
        if step % args.log_every == 0 or step in (1, args.max_steps):
            if world > 1:
                dist.all_reduce(loss)                       # each rank holds its share of the mean
            train = float(loss[:2] @ weight[:2])            # waits for the GPU: not every step
            history.append({"step": step, "train": train, "val": val, "lr": lr, "norm": float(norm)})
            if rank == 0:
                print(f"step {step:5d} | loss {train:.4f} | lr {lr:.1e} | norm {norm:.2f} | "
                      f"{time.perf_counter() - start:.0f} s", flush=True)

    if world > 1:
        dist.barrier()                                      # rank 0 may still be saving
        model = raw                                         # frees the wrapper before its process group
        dist.destroy_process_group()
    if rank == 0:
        errors, factor = conclude(raw, table, base_rmse, args, autocast, history)
        if prepared is not None:
            write_result(raw, table, prepared, errors, factor, args)
    return history


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        out_dir = get_parser().parse_args().out_dir
        print(f"\nstopped; to go on: python {SCRIPT}.py --resume --out_dir {out_dir}", flush=True)
        os._exit(130)                                       # at once: threads may be at work
