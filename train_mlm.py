"""
Masked modelling on a table that changes over time: hide some cells, learn to fill them in.

    python train_mlm.py                                             # simulated sensors, about 3 minutes on two cores
    python train_mlm.py --mask_prob 0.2
    python train_mlm.py --data my.csv --mask_style span             # your own file; gaps in runs
    python train_mlm.py --score observed                            # the mistake this project began with
    python train_mlm.py --resume --max_steps 2400                   # go on from out/train_mlm/last.pt
    torchrun --standalone --nproc_per_node=2 train_mlm.py           # two processes, or two GPUs

Its twin, train_ar.py, predicts the next row instead. Above the marker line stands what makes the two objectives
different, below it the training loop, which is the same in both, line for line.
"""
import argparse
import csv
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import add_arguments, fail, load_table, number, step_generator
from masking import (Inputs, Targets, bert_style_masking, create_attention_mask, create_masks, get_mask_probability,
                     pencil_category, pencil_in, scorable)
from model import Config, TableTransformer, count_scored, sum_losses, window_scale

# -----------------------------------------------------------------------------
# every knob

SCRIPT = "train_mlm"


def get_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, usage=f"python {SCRIPT}.py [--flag value ...]", allow_abbrev=False,
        formatter_class=type("", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {}))
    add_arguments(parser, "sensors")
    share = number(float, 0, 1)
    rate = number(float, 0, 1, inside=True)
    # objective
    add = parser.add_argument_group("objective").add_argument
    add("--mask_prob", type=rate, default=0.3, help="the share of observed cells hidden in training")
    add("--mask_prob_start", type=rate, help="progressive: begin here and rise to --mask_prob (None: constant)")
    add("--mask_spread", type=share, default=0.75,
        help="each window draws its own rate, off --mask_prob by up to this share of the way to 0 or 1 (0: one rate)")
    add("--mask_style", choices=["cell", "span"], default="cell", help="hide single cells, or runs of rows in a column")
    add("--mask_span", type=number(float, 1), default=12.0, help="mean rows of a run, with --mask_style span")
    add("--mask_share", type=share, default=0.8, help="of the hidden cells, the share shown as [MASK]")
    add("--random_share", type=share, default=0.1, help="the share shown as another value; the rest stays")
    add("--score", choices=["hidden", "observed"], default="hidden",
        help="cells in the loss; observed is the identity-reconstruction mistake, kept as an experiment")
    add("--eval_mask_probs", type=rate, nargs="+", default=[0.125, 0.25, 0.375, 0.5], help="the rates of evaluation")
    # model
    add = parser.add_argument_group("model").add_argument
    add("--n_layer", type=number(int, 1), default=4, help="transformer blocks")
    add("--n_head", type=number(int, 1), default=4, help="attention heads")
    add("--n_embd", type=number(int, 2), default=128, help="D, width of the residual stream")
    add("--dropout", type=share, default=0.0, help="while training")
    # optimisation
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", type=number(int, 1), default=32, help="windows in one forward pass")
    add("--grad_accum", type=number(int, 1), default=1, help="forward passes in one step")
    add("--max_steps", type=number(int, 0), default=1200, help="optimiser steps")
    add("--lr", type=number(float, 0), default=1e-3, help="peak learning rate")
    add("--min_lr", type=number(float, 0), default=5e-5, help="where the cosine ends")
    add("--warmup_steps", type=number(int, 0), default=100, help="linear warmup")
    add("--weight_decay", type=number(float, 0), default=0.1, help="of the matrices, not of biases and norms")
    add("--grad_clip", type=number(float, 0), default=1.0, help="largest gradient norm (0: no clipping)")
    add("--loss", choices=["mse", "huber"], default="mse", help="of numeric cells")
    # run
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto is cuda where there is one, else cpu")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="of autocast; auto is bfloat16 where the GPU has it, float16 on an older one, float32 on a CPU")
    add("--compile", action="store_true", help="torch.compile the model: a minute's wait, then faster on a GPU")
    add("--seed", type=number(int, 0), default=0, help="of weights, batches and masks")
    add("--eval_every", type=number(int, 1), default=100, help="steps between evaluations, which save as well")
    add("--eval_stride", type=number(int, 1), help="rows between test windows (None: seq_len // 4)")
    add("--log_every", type=number(int, 1), default=10, help="steps between log lines")
    add("--out_dir", default=f"out/{SCRIPT}", help="where checkpoints, log.csv, results.json and pictures go")
    add("--resume", action="store_true",
        help="go on from out_dir/last.pt with its flags; flags given here override them")
    return parser


def check(args):
    """What no single flag can know."""
    if args.mask_share + args.random_share > 1:
        fail(f"--mask_share {args.mask_share} and --random_share {args.random_share} must not exceed 1 together")
    highest = args.mask_prob + args.mask_spread * min(args.mask_prob, 1 - args.mask_prob)
    if args.mask_style == "span" and highest > 1 - 1 / args.mask_span:
        fail(f"--mask_span {args.mask_span:g} is too short to hide {highest:.0%} of a window's cells in runs "
             "(--mask_prob and --mask_spread)")


# -----------------------------------------------------------------------------
# THE OBJECTIVE: fill in the blanks

CAUSAL = False          # who may look where: every row at every row


def objective(batch, args, generator, step=None, case=None):
    """Batch -> what the model sees, and what it is asked. In training `step` sets the rate; in evaluation `case` is
    the rate, and every hidden cell is shown as [MASK]."""
    N, rate, mask_share, style = batch.numeric.shape[-1], case, 1.0, "cell"
    if case is None:
        rate = get_mask_probability(step, args.max_steps, args.mask_prob_start or args.mask_prob, args.mask_prob)
        u = 2 * torch.rand(len(batch.valid), 1, 1, generator=generator) - 1     # (B, 1, 1), each window its own rate
        rate, mask_share, style = rate + u * args.mask_spread * min(rate, 1 - rate), args.mask_share, args.mask_style
    answerable = scorable(batch.observed, batch.categorical)
    hidden = create_masks(answerable, rate, generator, style, args.mask_span)
    numeric, categorical, shown = bert_style_masking(
        batch.numeric, batch.categorical, batch.observed, hidden, generator, mask_share, args.random_share)
    known = batch.observed & ~hidden
    pencil = pencil_in(batch.numeric, known[..., :N], CAUSAL)
    pencil_ids = pencil_category(batch.categorical, known[..., N:], CAUSAL)
    attend = None if batch.valid.all() else create_attention_mask(batch.valid, CAUSAL)
    score = hidden if args.score == "hidden" or case else answerable
    return (Inputs(numeric, categorical, shown, known, pencil, pencil_ids, batch.clock, attend),
            Targets(batch.numeric, batch.categorical, score))


def eval_cases(args):
    return args.eval_mask_probs


def baselines(inputs):
    """What one would fill in without a model: {name: (numbers (B, T, N), ids (B, T, K))}."""
    N, known, mode = inputs.numeric.shape[-1], inputs.known, 2               # id 2 is the most frequent value
    last = pencil_category(inputs.categorical, known[..., N:], causal=True)
    return {
        "linear": (inputs.pencil, inputs.pencil_ids.clamp(min=mode)),           # categories: the nearest known one
        "last": (pencil_in(inputs.numeric, known[..., :N], causal=True), last.clamp(min=mode)),
        "mean": (torch.zeros_like(inputs.pencil), torch.full_like(last, mode)),  # 0 is the centre of the train rows
    }


def report(errors, cells, table, args):
    """Print the test table; return what results.json keeps of it."""
    def mean(sums, columns):
        sums, counts = sums[:, columns].sum(1).tolist(), cells[:, columns].sum(1).tolist()
        return [s / c if c else None for s, c in zip(sums, counts)]
    N, results = len(table.schema.numeric), {}
    for name, (absolute, square) in errors.items():
        wrong = mean(square, slice(N, None))
        results[name] = {"mse": mean(square, slice(N)), "mae": mean(absolute, slice(N)),
                         "accuracy": [None if w is None else 1 - w for w in wrong]}
    for measure, title in (("mse", "mean squared error, scaled units"), ("accuracy", "accuracy of categories")):
        if None not in results["model"][measure]:
            print(f"\n{title:<34}" + "".join(f"{f'{rate:.1%} hidden':>15}" for rate in args.eval_mask_probs) + f"{'mean':>9}")
            for name in results:
                values = results[name][measure]
                print(f"{name:<34}" + "".join(f"{v:>15.4f}" for v in values) + f"{sum(values) / len(values):>9.4f}")
    return {"eval_mask_probs": args.eval_mask_probs, "test": results}


def demonstrate(guess, table, args, plt):
    """One test window, a few columns: what was hidden, the truth, the guess, and what was pencilled in."""
    windows = table.starts("test", table.seq_len)
    batch = table.batch(windows[len(windows) // 2][None])
    inputs, targets = objective(batch, args, step_generator(0), case=0.3)
    N, score = len(table.schema.numeric), targets.score[0]
    spread = window_scale(batch.numeric, batch.observed[..., :N])[1][0, 0] * score[:, :N].any(dim=0)
    chosen = spread.argsort(descending=True)[:4].tolist()                       # the columns that move most here
    truth, filled, pencilled = (table.schema.decode(x[0], batch.categorical[0])
                                for x in (batch.numeric, guess(inputs), inputs.pencil))
    if not chosen:
        return {}
    figure, axes = plt.subplots(len(chosen), 1, figsize=(9, 1.9 * len(chosen)), sharex=True, squeeze=False)
    rows, seen, hidden = np.arange(table.seq_len), inputs.known[0].numpy(), score.numpy()
    for axis, j in zip(axes[:, 0], chosen):
        name = table.schema.numeric[j]
        for here, line, style in ((seen[:, j], truth, dict(marker=".", color="black", ms=4, label="seen")),
                                  (hidden[:, j], truth, dict(marker="o", color="black", mfc="none", label="hidden truth")),
                                  (hidden[:, j], pencilled, dict(marker="x", color="#E69F00", ms=5, label="linear")),
                                  (hidden[:, j], filled, dict(marker=".", color="#0072B2", ms=6, label="model"))):
            axis.plot(rows[here], line[name][here], ls="", **style)
        axis.set_ylabel(name)
    axes[0, 0].legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    axes[-1, 0].set_xlabel("row of the window")
    return {"window.png": figure}


# ---- from here to the end train_mlm.py and train_ar.py are the same, line for line ----

EVAL_BATCH = 32         # fixed, so that the masks of an evaluation do not change with --batch_size


def move(tensors, device):
    """Inputs or Targets -> the same on the device."""
    return type(tensors)(*(t if t is None else t.to(device, non_blocking=True) for t in tensors))


@torch.no_grad()
def evaluate(model, table, split, stride, args, device, autocast):
    """The model and every baseline on a whole split, the same windows and masks every time.

    Returns losses (2,), numeric and categorical, the mean over the cases; errors {method: (2, cases, F)}, sums of
    absolute and of squared errors, a wrong category counting 1; cells (cases, F), how many were scored; and how many
    lay beyond the clip and so were scored for nobody.
    """
    model.eval()
    cases, windows, K = eval_cases(args), table.starts(split, stride).split(EVAL_BATCH), len(table.schema.categorical)
    losses, beyond, errors = torch.zeros(2), 0, {}
    cells = torch.zeros(len(cases), table.observed.shape[1], dtype=torch.float64)
    for i, case in enumerate(cases):
        generator, sums, counts = step_generator(0, i), 0.0, 0.0
        for window in windows:
            inputs, targets = (move(t, device) for t in objective(table.batch(window), args, generator, case=case))
            outside = targets.score & F.pad(targets.numeric.abs() >= table.schema.clip, (0, K))
            targets = targets._replace(score=targets.score & ~outside)
            with autocast:
                guess = model(inputs)
            sums, counts = sums + sum_losses(guess, targets, args.loss), counts + count_scored(targets)
            ids = [logits.argmax(-1) + 2 for logits in guess.logits]                        # K of (B, T)
            ids = torch.stack(ids, -1) if K else targets.categorical                        # (B, T, K)
            methods = {"model": (guess.numeric, ids), **baselines(inputs)}
            for name, (numbers, labels) in methods.items():
                error = torch.cat([numbers - targets.numeric, labels != targets.categorical], -1)   # (B, T, F)
                error = torch.where(targets.score, error, 0.0).cpu().double()
                total = errors.setdefault(name, torch.zeros(2, *cells.shape, dtype=torch.float64))
                total[:, i] += torch.stack([error.abs().sum((0, 1)), error.square().sum((0, 1))])
            cells[i] += targets.score.sum((0, 1)).cpu()
            beyond += int(outside.sum())
        losses += (sums / counts.clamp(min=1)).cpu() / len(cases)
    model.train()
    return losses, errors, cells, beyond


def learning_rate(step, args):
    """Linear warmup that starts above 0, then a cosine from --lr to --min_lr at the last step."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - 1 - args.warmup_steps)
    low = min(args.min_lr, args.lr)
    return low + (args.lr - low) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def save(path, state):
    """Write beside the file and rename: whoever kills us finds the old file or the new one, never half of one."""
    torch.save(state, path + ".tmp")
    os.replace(path + ".tmp", path)


def load_checkpoint(path):
    """Only tensors and plain Python are read (weights_only): a checkpoint cannot run code."""
    if not os.path.exists(path):
        fail(f"{path}: no such checkpoint; --resume goes on from an earlier run with the same --out_dir")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:      # half a file and a foreign one raise half a dozen kinds of error
        fail(f"{path}: cannot be read as a checkpoint ({type(e).__name__})")


def parse(argv):
    """Flags, and the checkpoint to go on from or None. On --resume the checkpoint's flags become the defaults."""
    parser = get_parser()
    args, checkpoint = parser.parse_args(argv), None
    if args.resume:
        checkpoint = load_checkpoint(os.path.join(args.out_dir, "last.pt"))
        was = checkpoint["args"]
        parser.set_defaults(**was)
        args = parser.parse_args(argv)
        for name in sorted(set(was) - {"resume", "out_dir"}):
            if getattr(args, name) != was[name]:
                print(f"--{name} {getattr(args, name)} overrides {was[name]} of the checkpoint")
    check(args)
    return args, checkpoint


def pick_device(args, world):
    """Returns the device and the dtype of autocast, as a name."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if name == "cuda" and world > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {args.device} cannot be used here ({str(e).splitlines()[0]})")
    best = "float32" if device.type != "cuda" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return device, best if args.dtype == "auto" else args.dtype


def conclude(model, table, args, device, autocast, history, facts):
    """The test split, read once: tables on the screen, results.json and pictures in out_dir."""
    _, errors, cells, beyond = evaluate(model, table, "test", args.eval_stride or max(1, table.seq_len // 4),
                                        args, device, autocast)
    schema = table.schema
    results = {"script": SCRIPT, "data": args.data, **facts, "seed": args.seed, **report(errors, cells, table, args)}
    with open(os.path.join(args.out_dir, "results.json"), "w") as file:
        json.dump(results, file, indent=1)

    scale = torch.tensor(schema.scale + [1.0] * len(schema.categorical), dtype=torch.float64)
    print(f"\n{'mean absolute error, own units':<32}" + "".join(f"{name:>11}" for name in errors))
    for j, name in enumerate(schema.numeric + schema.categorical):
        mean = {m: float((e[0, :, j] / cells[:, j].clamp(min=1)).mean() * scale[j]) for m, e in errors.items()}
        if cells[:, j].any():
            name += " (share wrong)" if j >= len(schema.numeric) else ""
            print(f"{name:<32}" + "".join(f"{value:>11.4g}" for value in mean.values()))
    if beyond:
        print(f"{beyond} hidden cells beyond --clip {schema.clip} were scored for nobody")

    try:
        import matplotlib
        matplotlib.use("Agg")                                   # no window, only files
        import matplotlib.pyplot as plt
    except ImportError:
        print("no pictures without matplotlib: pip install matplotlib")
        return
    log = pd.DataFrame(history, columns=["step", "train", "val"])
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(log["step"], log["train"], color="#999999", lw=1, label="train")
    axis.plot(log["step"], log["val"], color="#0072B2", label="val")
    axis.set(xlabel="step", ylabel="loss, numeric + categorical", yscale="log")
    axis.legend(frameon=False)

    @torch.no_grad()
    def guess(inputs):
        return model(move(inputs, device)).numeric.cpu()

    model.eval()
    for name, figure in {"loss.png": figure, **demonstrate(guess, table, args, plt)}.items():
        figure.savefig(os.path.join(args.out_dir, name), dpi=120, bbox_inches="tight")
        plt.close(figure)
        print(f"wrote {args.out_dir}/{name}")


def main(argv=None):
    """Train, then judge on the test split. Returns the log, a list of dicts."""
    args, checkpoint = parse(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # set by torchrun
    device, dtype = pick_device(args, world)
    autocast = nullcontext() if dtype == "float32" else torch.autocast(device.type, getattr(torch, dtype))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")      # float16 alone underflows to 0
    table = load_table(args)
    schema = asdict(table.schema)
    torch.manual_seed(args.seed)
    try:
        raw = TableTransformer(Config(len(table.schema.numeric), table.schema.vocab_sizes(), table.schema.n_clock,
                                      table.seq_len, args.n_layer, args.n_head, args.n_embd, args.dropout, CAUSAL))
    except ValueError as e:
        fail(str(e))
    raw.to(device)
    # weight decay pulls matrices towards 0, not biases and norms
    groups = [{"params": [p for p in raw.parameters() if p.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in raw.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda"))

    step, best, history, log_path = 0, math.inf, [], os.path.join(args.out_dir, "log.csv")
    if checkpoint:
        if checkpoint["schema"] != schema:
            fail(f"{args.out_dir}/last.pt was trained on another table: columns, scales or categories of {args.data} differ")
        try:
            raw.load_state_dict(checkpoint["model"])
        except RuntimeError:
            fail(f"{args.out_dir}/last.pt holds a model of another shape; leave --n_layer, --n_head, --n_embd as they were")
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        step, best = checkpoint["step"], checkpoint["best"]
        if os.path.exists(log_path):
            history = pd.read_csv(log_path).query("step <= @step").to_dict("records")
    if rank == 0:
        os.makedirs(args.out_dir, exist_ok=True)
        pd.DataFrame(history).to_csv(log_path, index=False)
    model = torch.compile(raw) if args.compile else raw
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    n_params, N = sum(p.numel() for p in raw.parameters()), len(schema["numeric"])
    if rank == 0:
        print(f"{args.data}: {len(table.observed):,} rows, {len(schema['numeric'])} numeric and "
              f"{len(schema['categorical'])} categorical columns, windows of {table.seq_len} rows\n"
              f"{n_params / 1e6:.2f} M parameters on {device} in {dtype}, step {step} of {args.max_steps}")

    began = since = time.time()
    first = logged = step
    val, running = math.nan, torch.zeros(2, device=device)
    while True:
        # evaluate and save
        if rank == 0 and (step % args.eval_every == 0 or step >= args.max_steps):
            losses, errors, cells, _ = evaluate(raw, table, "val", table.seq_len, args, device, autocast)
            val = float(losses.sum())
            squared = {name: float((e[1, :, :N].sum() / cells[:, :N].sum().clamp(min=1))) for name, e in errors.items()}
            print(f"step {step:5d} | val loss {val:.4f}, numeric {losses[0]:.4f}, categorical {losses[1]:.4f} | "
                  f"mse {squared['model']:.4f}, linear {squared['linear']:.4f}")
            state = {"model": raw.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                     "step": step, "best": min(best, val), "args": vars(args), "schema": schema}
            if val < best:
                best = val
                save(os.path.join(args.out_dir, "best.pt"), state)
            save(os.path.join(args.out_dir, "last.pt"), state)
        if step >= args.max_steps:
            break

        # one optimiser step
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        generator = step_generator(args.seed, step, rank)
        torch.manual_seed(generator.initial_seed())             # dropout draws from the global generator
        micro = [objective(table.batch(table.sample("train", args.batch_size, generator)), args, generator, step=step)
                 for _ in range(args.grad_accum)]
        count = sum(count_scored(targets) for _, targets in micro).to(device)   # (2,) of the whole step, all ranks
        if world > 1:
            dist.all_reduce(count)
        for i, (inputs, targets) in enumerate(micro):
            model.require_backward_grad_sync = i == len(micro) - 1              # the ranks talk once a step
            with autocast:
                guess = model(move(inputs, device))
            losses = sum_losses(guess, move(targets, device), args.loss) / count.clamp(min=1)             # (2,)
            scaler.scale(losses.sum() * world).backward()                       # gradients are averaged over ranks
            running += losses.detach()
        scaler.unscale_(optimizer)
        # the one host sync of a step. The gradients are those of all ranks, so is the norm: all stop, or none
        norm = float(torch.nn.utils.clip_grad_norm_(raw.parameters(), args.grad_clip or math.inf))
        if not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < 1):
            print(f"error: step {step}: the gradient norm is {norm}; stopped before the step, so last.pt in "
                  f"{args.out_dir} is sound", file=sys.stderr)
            raise SystemExit(1)
        scaler.step(optimizer)                                  # float16: leaves a non-finite step out ...
        scaler.update()                                         # ... and halves the scale
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # log
        if step % args.log_every == 0 or step == first + 1 or step == args.max_steps:
            if world > 1:
                dist.all_reduce(running)
            now, n = time.time(), step - logged
            numeric, categorical = (running / n).tolist()
            cells = n * world * args.grad_accum * args.batch_size * table.seq_len * table.observed.shape[1]
            left = (args.max_steps - step) * (now - began) / (step - first)
            row = {"step": step, "train": numeric + categorical, "numeric": numeric, "categorical": categorical,
                   "val": val, "lr": lr, "norm": norm, "cells_per_s": cells / (now - since)}
            history.append(row)
            if rank == 0:
                print(f"step {step:5d} | loss {row['train']:.4f}, numeric {numeric:.4f}, categorical {categorical:.4f} "
                      f"| lr {lr:.1e}, norm {norm:.2f}, {row['cells_per_s']:,.0f} cells/s, {left / 60:.1f} min left",
                      flush=True)
                with open(log_path, "a", newline="") as file:
                    writer = csv.DictWriter(file, row)
                    if len(history) == 1:
                        writer.writeheader()
                    writer.writerow(row)
            since, logged = now, step
            running.zero_()

    if rank == 0:
        raw.load_state_dict(load_checkpoint(os.path.join(args.out_dir, "best.pt"))["model"])
        facts = {"steps": step, "seconds": round(time.time() - began, 1), "n_params": n_params}
        conclude(raw, table, args, device, autocast, history, facts)
    if world > 1:
        dist.destroy_process_group()
    return history


if __name__ == "__main__":
    main()
