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

from data import (Batch, Schema, add_errors, add_loop_flags, check_target, draw_lines, draw_windows, fail,
                  find_hints, load_checkpoint, load_table, make_parser, mean_errors, next_rows, number, own_errors, parse,
                  pick_device, print_errors, print_table, read_text, replace_file, spell, step_generator, write_text)
from masking import (MOST_CELLS, Targets, autoregress, create_inputs, fit_autoregression, jitter, last_known, mix_up,
                     move, scorable, train_sequences, within_clip)
from model import Config, TableTransformer, count_scored, explain_non_finite, sum_losses

SCRIPT = "train_ar"
CAUSAL = True           # who may look where: every row of a window at itself and at those before it

# -----------------------------------------------------------------------------
# the knobs of this objective

def get_parser():
    parser = make_parser(__doc__, SCRIPT, "planets")
    add = parser.add_argument
    size = number(int, 1)
    # a roll-out goes on from rows that are slightly off: so does training, or it will not know how
    add("--noise", type=number(float, 0), default=0.05,
        help="on the numbers seen in training, as a share of their step from the row before")
    add("--mixup", type=number(float, 0, 1), default=0.0,
        help="a training window's numbers are up to this share those of another window")
    add("--base", choices=["closed", "last"],
        help="what the model corrects: the closed form, or the last value (None: the closed form, but for three and "
             "more groups, which may each have a law of its own)")
    add("--given", type=size, default=10, help="rows of a test window that a roll-out starts from")
    add("--horizons", type=size, nargs="+", default=[1, 5, 10, 19],
        help="steps ahead at which a roll-out is judged")
    add("--season", type=size, help="a further baseline: the value of so many rows ago (None: without it)")
    # 0.03: at 1 the gradient of the categories drowns that of the places (README)
    add("--category_weight", type=number(float, 0), default=0.03,
        help="of the categorical cells' loss beside the numeric cells'")
    add("--forecast", type=size, help="rows to write at the end, those that come next in each sequence ...")
    add("--to", metavar="FILE", help="... to this .csv")
    add_loop_flags(add, SCRIPT, max_steps=2000)
    return parser


# -----------------------------------------------------------------------------
# THE OBJECTIVE: say what comes next

def objective(batch, args, generator, step=None, case=None):
    """data.Batch -> what is shown of it, a Batch whose `observed` is what is known, and what is asked,
    Targets.

    Every row is asked for the row after it. In training, without `case`, what is seen is slightly off. """
    if case is None and args.mixup:
        batch = mix_up(batch, args.mixup, generator)
    shown = batch
    if case is None:
        shown = jitter(batch, args.noise, generator)
    # the target of row t is row t + 1; the last row has none, and padding is not observed
    score = scorable(batch).roll(-1, dims=1)
    score[:, -1] = False
    numeric = batch.numeric.roll(-1, dims=1)
    categorical = batch.categorical.roll(-1, dims=1)
    return shown, Targets(numeric, categorical, score)


def eval_cases(args):
    """{(kind, name): case of `objective`}."""
    return {("next", "next row"): "next row"}


def fit_closed_form(table, args):
    """The matrix for masking.autoregress, from the train rows; None where it would be too large."""
    if not 0 < table.seq_len * len(table.schema.numeric) <= MOST_CELLS:
        return None
    return fit_autoregression(train_sequences(table), table.seq_len)


def baselines(shown, args, closed_form=None):
    """What one would say comes next without training: {name: (numbers (B, T, N), ids (B, T, K))}."""
    N = shown.numeric.shape[-1]
    last = last_known(shown.numeric, shown.observed[..., :N])                   # (B, T, N)
    ids = last_known(shown.categorical, shown.observed[..., N:])                # (B, T, K)
    before = torch.cat([last[:, :1], last[:, :-1]], dim=1)                      # the row before each
    answers = {"last": (last, ids), "linear": (2 * last - before, ids)}
    if args.season:                                 # of the next row; if before the window, the last value
        rows = torch.arange(last.shape[1])
        ago = torch.where(rows + 1 < args.season, rows, rows + 1 - args.season)
        answers["season"] = (last[:, ago], ids[:, ago])
    if closed_form is not None:
        answers["ar"] = (autoregress(last, closed_form), ids)
    return answers


# -----------------------------------------------------------------------------
# what is done with the result

def rollout_windows(table, args):
    """Windows of the test split that hold the rows given and the rows asked for, as in Table.starts. Where
    time is split the given ones may lie before the test rows; what is asked never does."""
    windows = table.starts("test", args.eval_stride or max(1, table.seq_len // 4))
    if table.split_by_time:                                 # then the split begins seq_len rows early
        windows = windows + torch.tensor([table.seq_len - args.given, 0])
    # the last ones may be too near to the end of their sequence to be judged
    return windows[windows[:, 1] - windows[:, 0] >= args.given + max(args.horizons)]


def prepare(table, args):
    """What no flag can know alone, and what must not go wrong after minutes of training. Returns the rows to
    come, without their values, and their clock; or None."""
    if args.base is None:
        args.base = "closed" if table.split_by_time else "last"
    longest = max(args.horizons)
    if (args.season or 1) > args.given:
        fail(f"--season {args.season} looks back further than a roll-out's --given {args.given} rows")
    if args.given + longest > table.seq_len or len(rollout_windows(table, args)) == 0:
        fail(f"--given {args.given} rows and --horizons up to {longest} do not fit into windows of "
             f"{table.seq_len} rows (--seq_len), or into the test split; --given 3 --horizons 3 is less")
    if bool(args.forecast) != bool(args.to):
        fail("--forecast (how many rows) and --to (into which file) go together")
    if not args.forecast:
        return None
    check_target("--to", args.to, args.data)
    text = read_text(table, args)
    return text, *next_rows(table, text, args.forecast, args)


def report_test(model, table, errors, args):
    """Tables of the next row and of a roll-out, and a picture of it. Returns what results.json keeps."""
    schema = table.schema
    if args.data == "planets":                              # what never changes is left out, and easy
        places = [name for name in schema.numeric if name[-2:] in ("_x", "_y")]
        errors = errors[errors["column"].isin(places + schema.categorical)]
    longest = max(args.horizons)
    windows = rollout_windows(table, args)
    windows = windows[::1 + len(windows) * (args.given + longest) // 16_384]    # every n-th: 16,384 rows fit
    batch = table.batch(windows).rows(0, args.given + longest)
    given = batch.rows(0, args.given)
    future = batch.rows(args.given, None)
    targets = Targets(future.numeric, future.categorical, scorable(future))
    targets = within_clip(targets, future.numeric, args.clip)
    answers = {"model": model.rollout(given, future.clock)}
    for name in baselines(given, args, model.closed_form):
        answers[name] = model.rollout(given, future.clock,
                                      lambda shown: baselines(shown, args, model.closed_form)[name])
    lines = []
    for i in range(longest):
        row = {name: (rows.numeric[:, i:i + 1], rows.categorical[:, i:i + 1]) for name, rows in answers.items()}
        add_errors(lines, "rollout", i + 1, schema, Targets._make(x[:, i:i + 1] for x in targets), row)
    ahead = pd.concat(lines)
    ahead = ahead[ahead["column"].isin(errors["column"])]
    next_row = print_errors("next row", errors, schema)
    rolled = print_errors(f"rolled out from row {args.given}, rows ahead", ahead, schema, args.horizons)
    curve = mean_errors(ahead, schema.numeric, "square", "case").T
    draw_lines(f"{args.out_dir}/errors.png", curve, "rows ahead", "mean squared error, scaled")
    some = slice(len(windows) // 2, len(windows) // 2 + 3)
    asked = torch.arange(args.given + longest)[:, None] >= args.given           # (given + longest, 1)
    guesses = {}
    for name, rows in answers.items():
        guesses[name] = torch.cat([given.numeric, rows.numeric], dim=1)[some]
    draw_windows(f"{args.out_dir}/window.png", schema, Batch._make(x[some] for x in batch),
                 asked.expand_as(batch.observed)[some], guesses)
    test = {}
    for name in answers:
        ahead_mse = rolled[name]["mse"]
        test[name] = {"next_mse": next_row[name]["mse"][0], "next_accuracy": next_row[name]["accuracy"][0],
                      "rollout_mse": [ahead_mse[h - 1] for h in args.horizons]}
    return {"horizons": args.horizons, "test": test}


def write_result(model, table, prepared, errors, args):
    """--forecast: the rows that come next in each sequence."""
    if prepared is None:
        return
    text, rows, clock = prepared
    start, end = table.segments["all"].unbind(1)
    windows = torch.stack([torch.maximum(start, end - table.seq_len), end], dim=1)      # the last of each
    length = end - windows[:, 0]
    parts = {}                                              # by sequence
    for n in length.unique().tolist():                      # histories of equal length go together
        for some in (length == n).nonzero().flatten().split(256):
            ahead = model.rollout(table.batch(windows[some]).rows(0, n), clock[some])
            for i, sequence in enumerate(some.tolist()):
                parts[sequence] = ahead.numeric[i], ahead.categorical[i], ahead.observed[i]
    numeric, ids, there = (torch.cat(x) for x in zip(*[parts[i] for i in range(len(length))]))
    there = there & table.learnt()                          # no planet that was not there
    values = [*numeric.T, *ids.T]                                               # F of (sequences * steps,)
    for j, name in enumerate(table.schema.numeric + table.schema.categorical):
        if there[:, j].any():
            cells = spell(table, name, values[j][there[:, j]], text, args, forecast=True)
            rows.iloc[there[:, j].numpy(), rows.columns.get_loc(name)] = cells
    write_text(args.to, rows, args)
    print(f"wrote {args.to}: {args.forecast} rows of each of {len(length)} sequence(s)")


# ---- from here to the end train_mlm.py and train_ar.py are the same, line for line ----

def get_lr(step, args):
    """Linear warmup that starts above 0, then a cosine from --lr to --min_lr at the last step."""
    # Adam's averages are worth little before they have seen some steps
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    min_lr = min(args.min_lr, args.lr)                      # --lr 1e-5 is not meant to rise
    progress = (step - args.warmup_steps) / max(1, args.max_steps - 1 - args.warmup_steps)
    coeff = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))          # from 1 to 0
    return min_lr + coeff * (args.lr - min_lr)


def make_example(model, batch, args, generator, step=None, case=None):
    """data.Batch -> what is shown of it, Batch; what the model sees of that, Inputs; what is asked,
    Targets."""
    shown, targets = objective(batch, args, generator, step, case)
    inputs = create_inputs(shown, CAUSAL, model.base_form())
    return shown, inputs, within_clip(targets, inputs.base, args.clip)


def measure_base(model, table, args):
    """(N,) root mean squared error of the base on some train windows, the unit of the numeric loss: it starts
    near 1, says what share of the base's error is left, and a calm column weighs as much as a wild one."""
    generator = step_generator(0)
    batch = table.batch(table.sample("train", 64, generator))
    square, count = 0.0, 0
    for case in eval_cases(args).values():
        _, inputs, targets = make_example(model, batch, args, generator, case=case)
        score = targets.score[..., :inputs.base.shape[-1]]                      # (B, T, N)
        error = torch.where(score, inputs.base - targets.numeric, 0.0)
        square = square + error.square().sum(dim=(0, 1))
        count = count + score.sum(dim=(0, 1))
    rmse = (square / count.clamp(min=1)).sqrt()
    return rmse.clamp(min=0.01)                             # a constant column has no error


@torch.no_grad()
def evaluate(model, table, split, stride, base_rmse, args, autocast):
    """The model and every baseline on a whole split, the same windows and masks every time. Returns the two
    losses, (2,), the mean over the cases, and the summed errors, see data.add_errors."""
    model.eval()                                            # no dropout, until the next step
    device = base_rmse.device
    losses, lines = torch.zeros(2), []
    cases = eval_cases(args)
    for i, (kind, name) in enumerate(cases):
        generator = step_generator(0, i)                    # of its own: the same masks always
        sums, counts = torch.zeros(2), torch.zeros(2)
        for windows in table.starts(split, stride).split(32):
            batch = table.batch(windows)
            shown, inputs, targets = make_example(model, batch, args, generator, case=cases[kind, name])
            with autocast:
                prediction = model(move(inputs, device))
            sums += sum_losses(prediction, move(targets, device), base_rmse, args.loss).cpu()
            counts += count_scored(targets)
            # baselines see what the model saw, and answer for the same cells
            answers = {"model": (prediction.numeric.cpu(), prediction.ids().cpu())}
            answers.update(baselines(shown, args, model.closed_form))
            add_errors(lines, kind, name, table.schema, targets, answers)
        losses += sums / counts.clamp(min=1) / len(cases)
    return losses, pd.concat(lines)


def build_model(table, args, checkpoint, device):
    """The model and its optimiser, new or as they were in the checkpoint."""
    schema = table.schema
    closed_form = checkpoint["closed_form"] if checkpoint else fit_closed_form(table, args)
    config = Config(n_numeric=len(schema.numeric), vocab_sizes=schema.vocab_sizes(),
                    n_clock=table.clock.shape[1], seq_len=table.seq_len, causal=CAUSAL,
                    n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd,
                    dropout=args.dropout, clip=args.clip,
                    closed_base=args.base == "closed" and closed_form is not None)
    torch.manual_seed(args.seed)                            # the weights; the same on all ranks
    model = TableTransformer(config, closed_form).to(device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
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
        optimizer.load_state_dict({**optimizer.state_dict(), "state": checkpoint["optimizer"]["state"]})
    return model, optimizer


def conclude(model, table, base_rmse, args, autocast, history, facts):
    """The test split, read once, with the best weights. Returns its errors."""
    model.load_state_dict(load_checkpoint(f"{args.out_dir}/best.pt", SCRIPT)["model"])
    stride = args.eval_stride or max(1, table.seq_len // 4)             # a cell is asked several times
    _, errors = evaluate(model, table, "test", stride, base_rmse, args, autocast)
    results = {"script": SCRIPT, "data": args.data, "seed": args.seed, **facts,
               **report_test(model, table, errors, args)}
    text = json.dumps(results, indent=1)
    replace_file(f"{args.out_dir}/results.json", lambda path: Path(path).write_text(text))
    print_table("mean absolute error, own units", own_errors(errors, table.schema).dropna())
    log = pd.DataFrame(history, columns=["step", "train", "val"]).set_index("step")
    draw_lines(f"{args.out_dir}/loss.png", log, "step", "loss")
    return errors


def main(argv=None):
    """Train, then judge on the test split. Returns the rows of log.csv."""
    args, checkpoint = parse(get_parser(), argv, SCRIPT)
    rank = int(os.environ.get("RANK", 0))                   # one process, or one of several of torchrun
    world = int(os.environ.get("WORLD_SIZE", 1))
    device, dtype = pick_device(args)
    # weights stay float32; autocast does matrix products in a shorter type
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # or it underflows

    table = load_table(args, schema=checkpoint and Schema(**checkpoint["schema"]))
    prepared = prepare(table, args)                         # what is to be written at the end
    raw, optimizer = build_model(table, args, checkpoint, device)
    base_rmse = measure_base(raw, table, args).to(device)                       # (N,)
    weight = torch.tensor([1.0, args.category_weight], device=device)           # of the two losses
    step, best, val, history = 0, math.inf, math.nan, []
    if checkpoint:
        step = checkpoint["step"]
        best = checkpoint["best"]
        history = checkpoint["history"]
        scaler.load_state_dict(checkpoint["scaler"])
    # `model` may be wrapped for speed; `raw` owns the weights and is what is evaluated and saved
    model = torch.compile(raw) if args.compile else raw
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    facts = {"n_params": sum(p.numel() for p in raw.parameters()), "steps": args.max_steps}
    if rank == 0:                                           # one process speaks and writes for all
        print(f"{args.data}: {len(table.observed):,} rows; {facts['n_params']:,} parameters on {device}, {dtype}")
        for hint in find_hints(table, args):
            print("hint:", hint)
        if raw.closed_form is None:
            print("no closed form: --seq_len times the numeric columns is 0, or too large")

    def save(name):
        state = {"script": SCRIPT, "args": vars(args), "schema": asdict(table.schema),
                 "config": asdict(raw.config), "closed_form": raw.closed_form, "step": step,
                 "best": best, "history": history, "model": raw.state_dict(),
                 "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        replace_file(f"{args.out_dir}/{name}", lambda path: torch.save(state, path))
        log = pd.DataFrame(history)
        replace_file(f"{args.out_dir}/log.csv", lambda path: log.to_csv(path, index=False))

    since = time.perf_counter()
    while True:
        # evaluate and save
        if rank == 0 and (step % args.eval_every == 0 or step >= args.max_steps):
            losses, errors = evaluate(raw, table, "val", table.seq_len, base_rmse, args, autocast)
            val = float(losses @ weight.cpu())              # what the training loss is made of
            if history and history[-1]["step"] == step:
                history[-1]["val"] = val                    # the row was logged before we knew
            mse = mean_errors(errors, table.schema.numeric, "square", "kind").mean(axis=1)
            print(f"step {step:5d} | val loss {val:.4f} | mse", mse.round(4).to_dict())
            if val < best:                                  # never true of a NaN
                best = val
                save("best.pt")                             # what is judged at the end
            save("last.pt")                                 # what --resume goes on from
        if step >= args.max_steps:
            break

        # one optimiser step; batches and masks depend on seed, step and rank alone, so a run that was
        # resumed sees what it would have seen
        model.train()
        lr = get_lr(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        generator = step_generator(args.seed, step, rank)
        torch.manual_seed(generator.initial_seed())         # for dropout
        windows = [table.sample("train", args.batch_size, generator) for _ in range(args.grad_accum)]
        examples = [make_example(raw, table.batch(w), args, generator, step=step) for w in windows]
        count = sum(count_scored(targets) for _, _, targets in examples).to(device)     # (2,)
        if world > 1:
            dist.all_reduce(count)                          # scored cells of the whole step
        loss = torch.zeros(2, device=device)
        for _, inputs, targets in examples:
            with autocast:
                prediction = model(move(inputs, device))
            # over the count of all micro-batches: they add up to the mean of one big batch
            sums = sum_losses(prediction, move(targets, device), base_rmse, args.loss)
            losses = sums / count.clamp(min=1)
            scaler.scale(losses @ weight * world).backward()            # ranks average, we want the sum
            loss += losses.detach()                         # without its graph, which would stay alive
        scaler.unscale_(optimizer)                          # or the clipping would see scaled gradients
        # float16 overflows now and then, and its scaler leaves the step out; below 1 the model is at fault
        must_be_finite = scaler.get_scale() <= 1
        try:
            norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), args.grad_clip,
                                                  error_if_nonfinite=must_be_finite)
        except RuntimeError:                                # stop BEFORE the step: the weights are sound
            if rank == 0:
                save("last.pt")
            why = explain_non_finite(raw, examples, windows, table.schema.numeric)
            print(f"error: step {step}, rank {rank}: the gradient norm is not finite; stopped before the "
                  f"step, last.pt and best.pt in {args.out_dir} are sound", *why, sep="\n  ", file=sys.stderr)
            raise SystemExit(1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # log
        if step % args.log_every == 0 or step in (1, args.max_steps):
            if world > 1:
                dist.all_reduce(loss)                       # each rank holds its share of the mean
            row = {"step": step, "train": float(loss @ weight), "val": val, "lr": lr, "norm": float(norm)}
            history.append(row)
            if rank == 0:
                now = time.perf_counter()
                print(f"step {step:5d} | loss {row['train']:.4f} | lr {lr:.1e} | norm {norm:.2f} | "
                      f"{now - since:.1f} s", flush=True)
                since = now

    if world > 1:
        dist.barrier()
        model = raw                                         # frees the wrapper before its process group
        dist.destroy_process_group()
    if rank == 0:
        errors = conclude(raw, table, base_rmse, args, autocast, history, facts)
        write_result(raw, table, prepared, errors, args)
    return history


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        out_dir = get_parser().parse_args().out_dir
        print(f"\nstopped; go on from the last save: python {SCRIPT}.py --resume --out_dir {out_dir}")
        raise SystemExit(130)
