"""
Masked modelling on a table that changes over time: hide some cells, learn to fill them in.

    python train_mlm.py                                     # simulated sensors, minutes on two cores
    python train_mlm.py --mask_prob 0.2
    python train_mlm.py --data my.csv --fill filled.csv     # your own file, and its holes filled
    python train_mlm.py --data my.csv --mask_span 24        # whose holes are 24 rows long on average
    python train_mlm.py --score observed                    # the mistake of scoring what the model can see
    python train_mlm.py --resume --max_steps 2400           # go on from out/train_mlm/last.pt
    torchrun --standalone --nproc_per_node=2 train_mlm.py   # two processes, or two GPUs

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

from data import (Schema, add_errors, add_loop_flags, check_target, default_span, draw_lines, draw_windows,
                  fail, find_hints, load_checkpoint, load_table, make_parser, mean_errors, number,
                  own_errors, parse, pick_device, print_errors, print_table, read_text, replace_file,
                  step_generator, write_cells, write_text)
from masking import (Targets, bert_style_masking, create_masks, fit_closed_form, gaussian_fill,
                     get_mask_probability, hide, last_known, mix_up, move, scorable, within_clip)
from model import Config, TableTransformer, count_scored, explain_non_finite, sum_losses

SCRIPT = "train_mlm"
CAUSAL = False          # who may look where: every row of a window at every other

# ---- the knobs of this objective

def get_parser():
    parser = make_parser(__doc__, SCRIPT, "sensors")
    add = parser.add_argument
    share = number(float, 0, 1)
    rate = number(float, 0, 1, inside=True)
    add("--mask_prob", type=rate, default=0.3, help="share of cells hidden in training")
    add("--mask_prob_start", type=rate, help="rises from here to --mask_prob (None: constant)")
    add("--mask_spread", type=share, default=0.75,
        help="a window's rate is off --mask_prob by up to this share of the way to 0 or 1")
    add("--mask_span", type=number(float, 1),
        help="mean rows of a hidden run, in a window up to this (None: as in the file)")
    add("--mask_style", choices=["--mask_span 1", "--mask_span 12"], help="is gone; single cells, or runs")
    add("--mixup", type=share, default=0.0, help="up to this share of a window is another's")
    # a sentence model meets no [MASK] in use, so BERT shows true words as well; real holes ARE [MASK]
    add("--mask_share", type=share, default=1.0, help="of the hidden cells, shown as [MASK] (BERT: 0.8)")
    add("--random_share", type=share, default=0.0, help="of them, as another value (BERT: 0.1)")
    add("--score", choices=["hidden", "observed"], default="hidden",
        help="cells in the training loss; observed: the mistake of identity reconstruction")
    add("--base", choices=["closed", "linear"], default="closed", help="what the model corrects")
    add("--eval_mask_probs", type=rate, nargs="+", default=[0.125, 0.25, 0.375, 0.5],
        help="rates evaluated, of single cells and of runs")
    add("--category_weight", type=number(float, 0), default=1.0, help="of their loss beside numbers'")
    add("--fill", metavar="FILE", help="write the table to this .csv, its holes filled")
    parser.set_defaults(cycles=["day", "year"])             # neighbours tell the day of the week
    add_loop_flags(add, SCRIPT, max_steps=1200)
    return parser


# ---- THE OBJECTIVE: fill in the blanks

def draw_case(n_windows, step, args, generator):
    """The rate and the span of hiding that each training window has of its own, (B, 1, 1) each: real tables
    have few holes here and many there, short and long ones, and one model is to fill them all."""
    start = args.mask_prob_start or args.mask_prob
    rate = get_mask_probability(step, args.max_steps, start, args.mask_prob)    # of this step
    u = torch.rand(2, n_windows, 1, 1, generator=generator)
    rate = rate + (2 * u[0] - 1) * args.mask_spread * min(rate, 1 - rate)   # of each window, in (0, 1)
    return rate, args.mask_span ** u[1]                     # the span log-uniform, from single cells on


def objective(batch, args, generator, step=None, case=None):
    """data.Batch -> what is shown of it, a Batch whose `observed` is what is known, and what is asked,
    Targets. Training gives `step`, evaluation a `case`, the rate and the span of what it hides."""
    training = case is None
    if training and args.mixup:
        batch = mix_up(batch, args.mixup, generator)
    rate, span = case or draw_case(len(batch.valid), step, args, generator)
    answerable = scorable(batch)                                                # (B, T, F)
    hidden = create_masks(answerable, rate, generator, span)        # missing cells stay out of it
    shown = hide(batch, hidden)
    if training and args.mask_share < 1:
        shown = bert_style_masking(batch, hidden, generator, args.mask_share, args.random_share)
    score = hidden                                          # and not what is simply shown
    if training and args.score == "observed":
        score = answerable
    return shown, Targets(batch.numeric, batch.categorical, score)


def eval_cases(args):
    """{(kind, rate): case of `objective`}: single cells, and runs."""
    cells = {("cell", rate): (rate, 1.0) for rate in args.eval_mask_probs}
    runs = {("span", rate): (rate, args.mask_span) for rate in args.eval_mask_probs}
    return {**cells, **runs}


def baselines(inputs, args, closed_form=None):
    """What one would fill in without training: {name: (numbers (B, T, N), ids (B, T, K))}."""
    line = inputs.numeric                                   # (B, T, N)
    nearest = inputs.categorical                            # (B, T, K)
    N = line.shape[-1]
    known = inputs.known[..., :N]
    answers = {"linear": (line, nearest)}
    answers["last"] = last_known(line, known), last_known(nearest, inputs.known[..., N:])
    answers["mean"] = torch.zeros_like(line), torch.zeros_like(nearest)         # of train rows; no category
    if closed_form is not None:
        fill = inputs.base                                  # already solved, for the model
        if inputs.deviation is None:                        # or not: --base linear
            fill, _ = gaussian_fill(line, known, closed_form)
        answers["gauss"] = fill, nearest
    return answers


# ---- what is done with the result

def prepare(table, args):
    """What no flag can know alone, and what must not go wrong after minutes of training. Returns the text of
    the file that is to be filled, or None."""
    if args.mask_share + args.random_share > 1:
        fail(f"--mask_share {args.mask_share} and --random_share {args.random_share} exceed 1 together")
    if args.mask_span is None:
        args.mask_span = default_span(table)
    if args.intervals and not args.fill:
        fail("--intervals says how sure --fill is: give both")
    check_target("--fill", args.fill, args.data)
    check_target("--intervals", args.intervals, args.data, args.fill)
    return read_text(table, args) if args.fill else None    # or a refusal, before the first step


def report_test(model, table, errors, factor, args):
    """Tables of the test errors, and pictures. Returns what results.json keeps."""
    schema = table.schema
    cells = errors[errors["kind"] == "cell"]                # the kinds of eval_cases
    runs = errors[errors["kind"] == "span"]
    test = {"cell": print_errors("single cells hidden", cells, schema),
            "span": print_errors(f"runs of {args.mask_span:.3g} rows hidden", runs, schema)}
    curve = mean_errors(runs, schema.numeric, "square", "case").T   # a line a rate, a column a method
    draw_lines(f"{args.out_dir}/errors.png", curve, "share hidden, in runs", "mean squared error")
    windows = table.starts("test", table.seq_len)
    batch = table.batch(windows[len(windows) // 2:][:3])                        # from the middle of the split
    inputs, targets = make_example(model, batch, args, step_generator(0), case=(0.3, args.mask_span))
    said = model.predict(inputs).interval(factor, args.coverage)
    said = said[..., :len(schema.numeric)]                                      # (4, B, T, N)
    guesses = {"linear": inputs.numeric, "model": said[0]}
    draw_windows(f"{args.out_dir}/window.png", schema, batch, targets.score, guesses, said[1:3])
    return {"eval_mask_probs": args.eval_mask_probs, "mask_span": args.mask_span, "test": test}


def predict_rows(model, table, factor, args):
    """What the model says of every row of the table, (4, rows, F), see Prediction.interval."""
    said = torch.zeros(4, *table.observed.shape)
    first_rows = table.segments["all"][:, 0].tolist()
    T = table.seq_len
    for window in table.starts("all", max(1, T // 2)).split(1):                 # they overlap by half
        inputs = model.inputs(table.batch(window))
        answer = model.predict(inputs).interval(factor, args.coverage)[:, 0]                    # (4, T, F)
        first, end = window[0].tolist()
        # the window before has answered for the first quarter, where this one sees little of what came before
        start = first if first in first_rows else first + T // 4
        stop = min(first + T, end)
        said[:, start:stop] = answer[:, start - first:stop - first]
    return said


def write_result(model, table, text, errors, factor, args):
    """--fill: the table with a value in every hole; --intervals: and how sure each is."""
    said = predict_rows(model, table, factor, args)
    placed = int(table.segments["all"].max())               # rows that belong to a sequence
    schema = table.schema
    test = own_errors(errors[errors["kind"] == "span"], schema)
    filled = pd.DataFrame(columns=["cells", "model", "linear"])
    lines = []
    for j, name in enumerate(schema.numeric + schema.categorical):
        gaps = (~table.observed[:placed, j]).nonzero()[:, 0].numpy()    # rows in order of time
        if not schema.learnt[j] or len(gaps) == placed:
            print(f"{name} is left empty: the train rows, or all of this table, have no value of it")
        elif len(gaps):
            rows = table.keys.index[gaps]                   # of the file
            lines.append(write_cells(text, rows, name, said[:, gaps, j], table, text, args))
            filled.loc[name] = [len(lines[-1]), *test.loc[name, ["model", "linear"]]]
    print_table("filled cells, and the mean error on test of runs as long as the holes, own units (-: not "
                "judged, for test has no values within --clip)", filled)
    blank = len(table.observed) - placed                    # they come last
    if blank:
        print(f"{blank:,} rows without a time or any value are left as they are")
    write_text(args.fill, text, lines, args)


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
