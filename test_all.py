"""
Every promise of this repository, executable.

    python test_all.py zoo                          # 27 ways to a NaN, the naive form beside ours
    python -m pytest test_all.py                    # about a minute on two cores
    NANOTAB_SLOW=1 python -m pytest test_all.py     # also what is slow
    ETTH1=ETTh1.csv python -m pytest test_all.py    # also the published protocol on a real table

Where a test guards against a well-known mistake it runs the mistake too, and shows that it fails.
"""
import ast
import contextlib
import functools
import io
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import data
import masking
import model
import train_ar
import train_mlm
from data import Batch, load_table, step_generator
from masking import create_inputs, create_masks, hide, interpolate

NAN = math.nan
UNIT = torch.tensor([1.0, 0.5, 2.0])
ROOT = Path(__file__).parent
SCRIPTS = {"train_mlm.py": train_mlm, "train_ar.py": train_ar}
slow = pytest.mark.skipif(not os.environ.get("NANOTAB_SLOW"), reason="slow: set NANOTAB_SLOW=1")
pytestmark = pytest.mark.filterwarnings("ignore:Parsing dates")
BOTH = ("--n_layer 1 --n_head 2 --n_embd 16 --batch_size 4 --seq_len 16 --max_steps 4 --eval_every 2 "
        "--log_every 1 --warmup_steps 2 --eval_stride 16 --device cpu")
SMALL = {train_mlm: [*BOTH.split(), "--eval_mask_probs", "0.3"],
         train_ar: [*BOTH.split(), "--given", "4", "--horizons", "1", "3"]}
EIGHT = "--max_steps 8 --dropout 0.1"
LEARN = "--seq_len 32 --n_embd 32 --n_layer 2 --batch_size 32 --lr 3e-3 --max_steps 150 --eval_every 150"
OBJECTIVE = train_mlm.objective                             # before any test puts another in its place
sys.modules["matplotlib.figure"] = None                     # as where there is none, which is quicker

# ---- a toy table, and ways to call things
def toy(rows=400, seed=0, noise=0.3):
    """A noisy wave, its mirror image, a category that is its sign, a time stamp, 5 % of holes."""
    rng = np.random.default_rng(seed)
    wave = np.sin(np.arange(rows) / 5) + noise * rng.standard_normal(rows)
    table = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=rows, freq="h"), "wave": wave,
                          "mirror": 7 - 2 * wave, "sign": np.where(wave > 0, "up", "down")})
    return table.assign(**{c: table[c].mask(rng.random(rows) < 0.05) for c in ("wave", "mirror", "sign")})

def words(*flags):
    """Flags as a shell would split them; each is a text such as "--lr 0 --clip 1", a path or a number."""
    return [word for flag in flags for word in shlex.split(str(flag))]

DATA, MLM, AR = data.make_parser(None, "data", "sensors"), train_mlm.get_parser(), train_ar.get_parser()
data_args = lambda *flags: DATA.parse_args(words(*flags))
mlm_args = lambda *flags: MLM.parse_args(words("--mask_span 6", *flags))
ar_args = lambda *flags: AR.parse_args(words(*flags))

def table_of(columns, *flags):                              # A Table of a DataFrame or of {name: values}
    return load_table(data_args(*flags), pd.DataFrame(columns))

def own_units(table, numeric):
    """Numbers (..., N) as the file has them."""
    return numeric * torch.tensor(table.schema.scale) + torch.tensor(table.schema.center)

def train(source, out, *flags, script=train_mlm):
    """A small run on a file, or on a DataFrame, which becomes a file beside `out`."""
    if isinstance(source, pd.DataFrame):
        source.to_csv(f"{out}.csv", index=False)
        source = f"{out}.csv"
    return script.main([*SMALL[script], "--data", str(source), *words(*flags), "--out_dir", str(out)])

def resume(out, *flags, script=train_mlm):
    """Go on with the run in `out`; every flag that is not given here is the checkpoint's."""
    return script.main(["--resume", "--out_dir", str(out), *words(*flags)])

def fill(frame, folder, *flags):
    """A DataFrame, filled by a small run."""
    train(frame, folder / "out", *flags, "--fill", folder / "filled.csv")
    return pd.read_csv(folder / "filled.csv")

def forecast(frame, folder, steps, *flags):
    """The rows that a small run says come next, a DataFrame of text."""
    flags += (f"--forecast {steps} --to", folder / "next.csv")
    train(frame, folder / "ar", *flags, script=train_ar)
    return pd.read_csv(folder / "next.csv", dtype=str)

def refused(run, capsys, says):
    """The run ends with code 2 and one sentence that has in it all that `says` names, separated by " / "."""
    with pytest.raises(SystemExit) as stopped:
        run()
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in message and "error: " in message.splitlines()[-1]
    assert all(part in message.splitlines()[-1] for part in says.split(" / ")), message

def results(out):
    return json.loads((Path(out) / "results.json").read_text())

def saved(out, name="last.pt"):
    return torch.load(Path(out) / name, weights_only=True)

def saved_model(out):
    checkpoint = saved(out, "best.pt")
    net = model.TableTransformer(model.Config(**checkpoint["config"]), checkpoint["closed_form"]).eval()
    net.load_state_dict(checkpoint["model"])
    return net

def same_bits(out, other):
    a, b = saved(out)["model"], saved(other)["model"]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def tidy(batch):
    """The Batch as data.py would have it: nothing is observed in padding, and what is not observed is 0."""
    real = batch.valid[..., None]
    return hide(batch, ~real)._replace(clock=batch.clock * real)

def random_batch(B=4, T=12, N=3, K=2, missing=0.2, seed=0):  # A Batch with ids 2..4 and a few [UNK]
    g = torch.Generator().manual_seed(seed)
    observed = torch.rand(B, T, N + K, generator=g) > missing
    ids = torch.randint(1, 5, (B, T, K), generator=g)
    return tidy(Batch(torch.randn(B, T, N, generator=g), ids, observed, torch.ones(B, T).bool(),
                      torch.randn(B, T, 4, generator=g), torch.arange(T).float().repeat(B, 1)))

def random_rows(rows=600, N=3):
    """Train rows whose columns and neighbouring rows have to do with each other, (rows, N)."""
    noise = torch.randn(rows, N, generator=step_generator(0))
    mixed = noise + 0.4 * noise.roll(1, dims=1)
    return torch.tensor(pd.DataFrame(mixed).ewm(alpha=0.3, adjust=False).mean().to_numpy()).float()

def random_model(N=3, K=2, causal=False, closed=False):
    """A small model whose heads are not zero; closed: its base is the closed form."""
    torch.manual_seed(0)
    fit = masking.fit_autoregression if causal else masking.fit_gaussian
    form = fit([random_rows(N=N)], 12) if closed else None
    config = model.Config(N, [5] * K, 4, 12, 2, 2, 16, causal=causal, closed=closed)
    net = model.TableTransformer(config, form)
    for head in (net.numeric_head, *net.class_heads):
        torch.nn.init.normal_(head.weight)
    return net

def ask(net, batch, *flags, case=None):
    """What train_mlm makes of a batch in its first step, or in a case of evaluation: Inputs and Targets."""
    return train_mlm.make_example(net, batch, mlm_args(*flags), step_generator(1), step=0, case=case)

def flat(prediction):  # Numbers and logits side by side: (B, T, N + all classes)
    return torch.cat([prediction.numeric, *prediction.logits], dim=-1)

def mean_losses(net, inputs, targets, dtype=torch.float32):
    """The losses of a step, (3,), of numbers, categories and scales, as the loop forms them."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        prediction = net(inputs)
    sums = model.sum_losses(prediction, targets, UNIT[:inputs.numeric.shape[-1]])
    return sums / model.count_scored(targets).clamp(min=1)

@pytest.fixture(scope="module")
def toy_csv(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "toy.csv"
    toy().to_csv(path, index=False)
    return str(path)

@pytest.fixture(scope="module")
def finished(toy_csv, tmp_path_factory):
    """The folder of one small run, with the flags EIGHT, that others compare with."""
    out = tmp_path_factory.mktemp("out")
    train(toy_csv, out, EIGHT)
    return out

# ---- data.py
def test_nan_stops_at_the_door(tmp_path):
    odd = ["1.5", "nan", "inf", "-1.18e42", "1e20", "Bad", "-9.00", " "] * 2 + [" NA "] * 8 + list(range(36))
    toy(60).assign(odd=odd, empty="", const=7).to_csv(tmp_path / "in.csv", index=False)
    table = load_table(data_args("--seq_len 8 --na_values -9 --data", tmp_path / "in.csv"))
    batch, names = table.batch(table.starts("train", 1)), table.schema.numeric
    assert all(torch.isfinite(x.float()).all() for x in batch)
    assert (torch.cat([batch.numeric, batch.categorical], dim=-1)[~batch.observed] == 0).all()
    assert (~table.observed[:, names.index("odd")]).sum() == 22                 # all of these but 1.5
    assert table.schema.scale[names.index("const")] == 1.0  # naive: 8 and 10 of the zoo

def test_schema_sees_train_rows_only_and_no_spike():
    changed = toy()
    changed.loc[280:, ["wave", "mirror", "sign"]] = 1e6, 1e6, "sideways"
    a, b = (table_of(frame, "--split 0.7 0.15 0.15") for frame in (toy(), changed))
    assert a.schema == b.schema
    assert toy()["wave"].std() != changed["wave"].std()     # naive: statistics over all rows see the change
    assert (b.categorical[280:] == data.UNK_ID).sum() == 120 and not (a.categorical == data.UNK_ID).any()
    assert b.numeric.abs().max() > 1e5                      # kept as it is, not clipped
    x = np.concatenate([[1e9, NAN], np.random.default_rng(0).normal(5, 2, 10_000)])
    schema = table_of({"x": x, "empty": NAN}).schema
    assert [*schema.center, *schema.scale] == pytest.approx([5, 0, 2, 1], rel=0.02)

def test_windows_stay_in_their_group_and_pad_on_the_right():
    lengths = [30, 5, 12, 40, 7, 9, 22, 3, 16, 50]
    well = np.repeat(np.arange(10), lengths)
    table = table_of({"well": well, "x": np.arange(194.0), "y": well * 1.0}, "--group_col well --seq_len 20")
    rows = {split: set() for split in ("train", "val", "test")}
    for split in rows:
        for windows in (table.starts(split, 7), table.sample(split, 200, step_generator(1))):
            batch = table.batch(windows)
            assert (batch.numeric[~batch.valid] == 0).all() and not batch.observed[~batch.valid].any()
            for numeric, real, when in zip(own_units(table, batch.numeric).round(), batch.valid, batch.time):
                assert numeric[real, 1].unique().numel() == 1                   # one group
                assert (numeric[real, 0].diff() == 1).all()                     # rows in order, none skipped
                assert real.sum() == min(20, lengths[int(numeric[0, 1])]) and real[:real.sum()].all()
                assert when[0] == 0 and (when[real].diff() == 1).all() and (when.diff() >= 0).all()
                rows[split] |= set(numeric[real, 0].tolist())
    assert sum(map(len, rows.values())) == 194 == len(set.union(*rows.values()))

@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_few_groups_give_every_part_something(n):
    frame = pd.DataFrame({"g": np.repeat(np.arange(n), 60), "x": np.arange(60.0 * n)})
    for split in ("0.7 0.15 0.15", "0.4 0.1 0.1"):
        table = table_of(frame, "--group_col g --seq_len 8 --split", split)
        assert all(len(table.starts(part, 8)) for part in ("train", "val", "test"))
        assert len(table.segments["all"]) == n

def test_time_sorts_rows_and_becomes_a_clock():
    table = table_of(toy(600).sample(frac=1, random_state=0))
    assert torch.equal(table.numeric, table_of(toy(600)).numeric)
    assert table.clock.shape == (600, 4)                  # 25 days: day and week are cycles, the year not yet
    day, quarters = table.clock[:, [0, 2]], torch.tensor([[0.0, 1], [1, 0], [0, -1], [-1, 0]])
    torch.testing.assert_close(day[[0, 6, 12, 42]], quarters, atol=1e-5, rtol=0)
    assert table_of({"date": pd.date_range("2020-01-01", periods=1500), "x": 1.0}).clock.shape == (1500, 6)

@pytest.mark.parametrize("column,kind", [
    (["a", "b", None], "categorical"), ([True, False, None], "categorical"), (["may", "june"], "categorical"),
    (["M3", "1h"], "categorical"), (["007", "01067", "10115"], "categorical"),
    ([1, 2], "numeric"), ([None, None], "numeric"), (["1.5", None], "numeric"),
    (["2024-01-01", "2024-01-02", None], "time"), (["01.03.2024 10:00", "31.03.2024 10:00"], "time"),
    (["2024-03-31 01:00+01:00", "2024-03-31 04:00+02:00"], "time")])
def test_kinds_are_inferred(column, kind):
    frame = pd.DataFrame({"x": pd.Series(column).astype("string"), "n": 1.0})
    assert data.infer_kinds(frame, data_args())["x"] == kind

def test_simulations_are_as_described():
    table = data.simulate_sensors(8000)
    pd.testing.assert_frame_equal(table, data.simulate_sensors(8000))
    assert table["humidity"].isna().all() and table["flow"].min() < -1e41
    assert table["mode"].eq("maintenance").idxmax() > 0.9 * len(table)          # first seen in the test rows
    table = data.simulate_planets(300)
    assert set(table.groupby("idx").size()) == set(range(30, 60))
    for i in range(5):
        x, y, a, e = (table[f"planet{i}_{name}"] for name in "xyae")
        assert (x.notna() == (table["n_planets"].str[0].astype(int) > i)).all()
        # Kepler's ellipse: the distance lies between a (1 - e) and a (1 + e); the column e is 20 times that
        assert ((np.hypot(x, y) / a - 1).abs() < e / 20 + 1e-3)[x.notna()].all()

# ---- masking.py: what is hidden, what the model starts from, who may look
def test_rate_and_runs_of_hidden_cells():
    """Each window has a rate and a span of its own; of span 1 are cells that know nothing of each other."""
    cases = [(rate, span) for rate in (0.05, 0.25, 0.5, 0.9) for span in (1, 4, 12)]
    rates, spans = torch.tensor(cases).repeat_interleave(256, dim=0)[..., None, None].unbind(1)
    hidden = create_masks(torch.ones(len(rates), 200, 10).bool(), rates, step_generator(1), spans)
    for (rate, span), own in zip(cases, hidden.split(256)):
        assert own.float().mean() == pytest.approx(rate, abs=0.012)
        assert own[:, 0].float().mean() == pytest.approx(rate, abs=0.06)        # the first row like any other
        ends = 1 - own[:, 1:][own[:, :-1]].float().mean()   # of the hidden cells, the last of a run
        assert 1 / ends == pytest.approx(max(span, 1 / (1 - rate)), rel=0.1)

def test_missing_cells_are_never_hidden_the_naive_form_hides_them():
    assert (torch.tensor([1.0, NAN, 3.0]) != 0).all()       # naive: NaN != pad is True
    batch = random_batch()
    for span in (1, 12):
        hidden = create_masks(masking.scorable(batch), 0.9, step_generator(0), span)
        assert not (hidden & ~batch.observed).any() and not hidden[..., 3:][batch.categorical == 1].any()

def test_80_10_10_and_the_two_draws_that_miss_it():
    batch = random_batch(64, 400, missing=0.1)
    batch = batch._replace(numeric=torch.arange(64 * 400 * 3).view(64, 400, 3).float())        # all different
    hidden = create_masks(masking.scorable(batch), 0.5, step_generator(0))
    shown = masking.bert_style_masking(batch, hidden, step_generator(1))
    masked, same = hidden & ~shown.observed, shown.numeric == batch.numeric
    for kind in (slice(3), slice(3, None)):
        assert masked[..., kind].sum() / hidden[..., kind].sum() == pytest.approx(0.8, abs=0.012)
    left = (hidden & shown.observed)[..., :3]
    for share in (left & ~same, left & same):               # another value, or its own
        assert share.sum() / hidden[..., :3].sum() == pytest.approx(0.1, abs=0.012)
    assert (torch.cat([shown.numeric, shown.categorical], dim=-1)[masked] == 0).all()
    assert same[batch.observed[..., :3] & ~hidden[..., :3]].all()               # nothing else is touched
    assert torch.equal(shown.observed[~hidden], batch.observed[~hidden])
    first, second = torch.rand(2, 10**6, generator=step_generator(0))         # naive: a second draw makes 2 %
    assert abs(((first >= 0.8) & (second < 0.1)).float().mean() - 0.1) > 0.05

def test_donors_come_from_the_same_column_and_are_known():
    batch = random_batch(8, 30, missing=0.3)
    column = torch.tensor([100.0, 200.0, 300.0]).expand(8, 30, 3)               # the value names its column
    named = torch.tensor([5, 7]).expand(8, 30, 2)                               # and so does the id, but
    ids = torch.where(batch.categorical < 2, batch.categorical, named)          # for [MASK] and [UNK]
    hidden = create_masks(batch.observed, 0.5, step_generator(0))
    marked = torch.where(hidden[..., :3] | ~batch.observed[..., :3], -1.0, column)      # -1: may not be lent
    batch = batch._replace(numeric=marked, categorical=ids)
    shown = masking.bert_style_masking(batch, hidden, step_generator(1), 0.0, 1.0)
    assert torch.equal(shown.numeric[hidden[..., :3]], column[hidden[..., :3]])
    assert torch.equal(shown.categorical[hidden[..., 3:]], named[hidden[..., 3:]])      # no [MASK], no [UNK]
    nobody = masking.bert_style_masking(batch, batch.observed, step_generator(1), 0.0, 1.0)     # lends
    assert not nobody.observed.any()

def test_mixed_windows_hold_known_numbers_alone_and_what_ties_columns():
    batch = random_batch(B=6)
    other = Batch(*(x.roll(1, 0) for x in batch))
    mixed = masking.mix_up(batch, 0.5, step_generator(0))
    both = (batch.observed & other.observed)[..., :3]
    assert torch.equal(mixed.observed, torch.cat([both, batch.observed[..., 3:]], dim=-1))
    assert (mixed.numeric[~both] == 0).all() and torch.equal(mixed.categorical, batch.categorical)
    for b in range(6):                                      # one share of the other window in all columns
        share = ((mixed.numeric - batch.numeric) / (other.numeric - batch.numeric))[b][both[b]]
        assert 0 < share.mean() < 0.5 and share.std() < 1e-3

def test_schedule_hits_both_ends():
    p = masking.get_mask_probability
    assert [p(step, 60, 0.05, 0.25) for step in (-5, 0, 59, 1000)] == [0.05, 0.05, 0.25, 0.25]
    assert [p(step, total, 0.05, 0.25) for step, total in ((0, 0), (0, 1), (1, 1))] == [0.05, 0.05, 0.25]
    assert np.allclose(np.diff([p(s, 60, 0.05, 0.25) for s in range(60)]), 0.2 / 59)
    assert 0.05 + 0.2 * 59 / 60 < 0.25                      # naive: epoch / total never arrives
    args = mlm_args("--lr 1 --min_lr 0.1 --warmup_steps 10 --max_steps 100")
    rates = [train_mlm.get_lr(s, args) for s in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1 and rates[-1] == pytest.approx(0.1)
    assert train_mlm.get_lr(0, mlm_args("--warmup_steps 0 --max_steps 1")) > 0

def test_the_base_is_what_pandas_would_write():
    g = torch.Generator().manual_seed(0)
    numeric = torch.randn(6, 40, 5, generator=g)
    known = torch.rand(6, 40, 5, generator=g) < 0.3
    known[0, :, 0] = False                                  # nothing to go by: 0
    time = torch.rand(6, 40, generator=g).cumsum(1)         # uneven steps
    both = interpolate(numeric, known, time)
    causal = masking.last_known(numeric, known)
    for b in range(6):
        frame = pd.DataFrame(numeric[b].double().numpy()).where(known[b].numpy())
        line = frame.set_axis(time[b].double().numpy()).interpolate("index", limit_direction="both").fillna(0)
        np.testing.assert_allclose(both[b], line, atol=1e-5)
        np.testing.assert_array_equal(causal[b], frame.ffill().fillna(0))
    assert torch.equal(both[known], numeric[known])
    by_row = interpolate(numeric, known, torch.arange(40.0).expand(6, 40))      # naive: by row number
    assert (by_row - both).abs().max() > 0.1
    ids = torch.tensor([2, 0, 0, 0, 3, 0, 0])[None, :, None]
    rows = torch.arange(7.0)[None]
    for time, expected in ((rows, [2, 2, 2, 3, 3, 3, 3]), (rows.sqrt(), [2, 2, 3, 3, 3, 3, 3])):
        assert masking.nearest_category(ids, ids > 0, time).flatten().tolist() == expected
    assert masking.last_known(ids, ids > 0).flatten().tolist() == [2, 2, 2, 2, 3, 3, 3]

def test_gaussian_fill_equals_a_dense_solve():
    T, N = 12, 3
    rows, batch = random_rows(), random_batch(N=N, K=0, missing=0.5)
    S = masking.lag_covariance([rows], T, own=1e-3, level=1.0)
    assert torch.equal(S, S.T) and torch.linalg.eigvalsh(S).min() > 0
    pairs = (rows[:-4].double().T @ rows[4:].double()) / len(rows) + torch.eye(N)               # 4 rows apart
    torch.testing.assert_close(S[2 * N:3 * N, 6 * N:7 * N], pairs)
    known, numeric = batch.observed, batch.numeric
    line = interpolate(numeric, known, batch.time)
    base, deviation = masking.gaussian_fill(line, known, masking.fit_gaussian([rows], T))
    assert torch.equal(base[known], numeric[known]) and (deviation[known] == 0).all()
    close = functools.partial(torch.testing.assert_close, atol=1e-3, rtol=1e-3)
    cells = (x.flatten(1) for x in (known, numeric.double(), base.double(), deviation.double()))
    for k, truth, mean, spread in zip(*cells):              # k: the known cells of a window
        weights = torch.linalg.solve(S[k][:, k], S[k][:, ~k])                   # (known, unknown)
        close(mean[~k], weights.T @ truth[k])
        close(spread[~k], (S[~k][:, ~k] - S[~k][:, k] @ weights).diagonal().sqrt())

def test_autoregression_equals_a_dense_solve():
    T, N, rows = 12, 3, random_rows()
    parts = [rows[:400], rows[400:]]                        # no step from one to the other
    regression = masking.fit_autoregression(parts, T)
    steps = [x.diff(dim=0) for x in parts]
    unit = torch.cat(steps).square().mean(0).sqrt()
    S = masking.lag_covariance([x / unit for x in steps], T, own=0.03, level=0.0)
    window = rows[100:100 + T][None]
    said = masking.autoregress(window, regression)[0]
    for t in (0, 1, 5, T - 1):
        before = (window[0].diff(dim=0)[:t] / unit).flatten().double()          # the t steps up to row t
        weights = torch.linalg.solve(S[:t * N, :t * N], before)
        next_step = S[t * N:(t + 1) * N, :t * N] @ weights * unit.double()
        torch.testing.assert_close(said[t].double(), window[0, t].double() + next_step, atol=1e-4, rtol=1e-4)
    far, short = (masking.autoregress(x, regression)[0] for x in (window + 1e3, window[:, :5]))
    torch.testing.assert_close(far - 1e3, said, atol=1e-2, rtol=0)
    torch.testing.assert_close(short, said[:5])

def test_no_query_is_ever_empty_the_naive_mask_makes_nan():
    valid = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    q, k, v = torch.randn(3, 3, 2, 4, 8).unbind(0)
    for causal in (False, True):
        attend = masking.create_attention_mask(valid) & (masking.causal_mask(4) | (not causal))
        assert attend.shape == (3, 1, 4, 4) and attend.any(-1).all()
        assert attend[0, 0].triu(1).any() == (not causal)
        assert not attend[1, 0, :2, 2:].any()               # padding is looked at by nobody real
        assert torch.isfinite(model.plain_attention(q, k, v, attend)).all()
    naive = valid[:, None, :, None] & valid[:, None, None, :]                 # whole padded query rows masked
    assert model.plain_attention(q, k, v, naive).isnan().any()

# ---- model.py
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_equals_plain_softmax_and_depends_on_the_distance_of_rows(dtype, tolerance, causal, padded):
    torch.manual_seed(0)
    valid = torch.arange(20) < torch.tensor([20, 7 if padded else 20])[:, None]
    full = masking.create_attention_mask(valid) & (masking.causal_mask(20) | (not causal))
    # causal, the model is given no mask: padding on the right is in the future of every real row
    attend = None if causal or not padded else full
    config = model.Config(1, [], seq_len=20, n_layer=0, n_head=4, n_embd=32, causal=causal)
    block, rotary = model.SelfAttention(config).to(dtype), model.TableTransformer(config).rotary
    x = torch.randn(2, 20, 32, dtype=dtype)
    q, k, v = block.qkv(x).view(2, 20, 3, 4, 8).float().permute(2, 0, 3, 1, 4)
    y = model.plain_attention(model.apply_rotary(q, rotary), model.apply_rotary(k, rotary), v, full)
    y = block.proj(y.transpose(1, 2).reshape(2, 20, 32).to(dtype))
    torch.testing.assert_close(block(x, attend, rotary)[valid], y[valid], atol=tolerance, rtol=tolerance)
    q, k = (model.apply_rotary(z[:, :, :1].expand_as(z), rotary) for z in (q, k))       # the same in all rows
    fit = q @ k.transpose(-2, -1)
    torch.testing.assert_close(fit[..., 1:, 1:], fit[..., :-1, :-1], atol=1e-5, rtol=1e-4)
    assert (fit[..., 1:, 0] - fit[..., :-1, 0]).abs().max() > 0.01

def test_who_sees_whom():
    assert model.find_leaks(causal=False).all()             # masked: past and future
    causal = model.find_leaks(causal=True)                  # naive, over heads: way 17 of the zoo
    assert torch.equal(causal, torch.ones(12, 12).tril().bool())

@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("flags", ["", "--mask_share 0.8 --random_share 0.1", "--mask_span 12"])
def test_inputs_hold_nothing_that_is_hidden(flags, closed):
    batch, net = random_batch(), random_model(closed=closed)
    inputs, targets = ask(net, batch, flags)
    covered = targets.score & ~inputs.known                 # shown as [MASK]
    assert covered[..., :3].any() and covered[..., 3:].any()
    assert (targets.score & inputs.known).any() == ("share" in flags)           # random and kept cells
    forged = batch._replace(numeric=torch.where(covered[..., :3], 9.0, batch.numeric),
                            categorical=torch.where(covered[..., 3:], 4, batch.categorical))
    other, asked = ask(net, forged, flags)
    assert not torch.equal(asked.numeric, targets.numeric)  # it is asked for other things, and sees the same
    assert all(ours is theirs is None or torch.equal(ours, theirs) for ours, theirs in zip(inputs, other))
    assert torch.equal(flat(net(inputs)), flat(net(other)))

def test_levels_far_away_are_clipped_for_the_network_and_not_for_the_base():
    batch, net, seen = random_batch(T=12), random_model(), []
    far = batch._replace(numeric=(batch.numeric + 1e4) * batch.observed[..., :3])
    hidden = create_masks(batch.observed, 0.3, step_generator(0))
    near, level = (net(create_inputs(hide(b, hidden), causal=False)).numeric for b in (batch, far))
    known = hide(batch, hidden).observed[..., :3].any(1, keepdim=True).expand_as(near)
    torch.testing.assert_close(level[known], near[known] + 1e4, atol=0.02, rtol=0)  # the level moves along
    net.embed.register_forward_hook(lambda _, given, __: seen.append(given[0].abs().max()))
    spike = batch._replace(numeric=batch.numeric * 1e8)
    assert torch.isfinite(flat(net(create_inputs(spike, causal=True)))).all() and max(seen) <= net.config.clip
    assert not ask(net, far)[1].score[..., :3].any()             # beyond the clip nothing is asked for

def outputs(net, batch, **changed):
    inputs, _ = train_ar.make_example(net, batch, ar_args(), step_generator(0))
    return flat(net(inputs._replace(**changed)))

def next_row_changed(batch, t):
    """The batch with everything another from row t on: numbers, ids, holes, clock, and where it ends."""
    other = random_batch(seed=9, missing=0.5)
    other.valid[:, t + 3:] = False
    return Batch(*(torch.cat([a[:, :t], b[:, t:]], dim=1) for a, b in zip(batch, tidy(other))))

@pytest.mark.parametrize("closed", [False, True])
def test_causal_outputs_depend_on_what_came_before_and_never_on_what_comes_after(closed):
    batch, net = random_batch(missing=0.4), random_model(causal=True, closed=closed)
    batch.valid[1, 9:] = False                              # with padding, too
    batch = tidy(batch)
    for t in range(1, 12):
        forged = next_row_changed(batch, t)
        now, then = outputs(net, batch), outputs(net, forged)
        assert torch.equal(now[:, :t], then[:, :t])         # not by a bit
        assert (now[:, t] != then[:, t]).any(-1).all()
        # naive: a base by interpolation, as in masked modelling, knows the future
        leaks = [outputs(net, b, base=interpolate(b.numeric, b.observed[..., :3], b.time))
                 for b in (batch, forged)]
        assert not torch.equal(leaks[0][:, :t], leaks[1][:, :t])
    batch = random_batch(missing=0)
    for field, value in (("numeric", 3.0), ("categorical", 0), ("clock", 3.0), ("observed", False)):
        changed = getattr(batch, field).clone()
        changed[:, 4] = value
        later = outputs(net, batch._replace(**{field: changed}))[:, 5:]
        assert (later != outputs(net, batch)[:, 5:]).any(-1).all(), field
    net.config.causal = net.config.closed = False           # naive: the level and spread of the whole window
    assert not torch.equal(outputs(net, batch)[:, :6], outputs(net, next_row_changed(batch, 6))[:, :6])

def test_the_target_is_the_next_row_and_missing_targets_are_not_scored():
    batch = random_batch(missing=0.3)
    shown, targets = train_ar.objective(batch, ar_args(), None, case="next row")
    for now, then in zip(targets, (batch.numeric, batch.categorical, masking.scorable(batch))):
        assert torch.equal(now[:, :-1], then[:, 1:])
    assert not targets.score[:, -1].any() and torch.equal(shown.observed, batch.observed)

def test_rollout_equals_a_loop_written_out():
    """Rows one at a time, the last 12 looked at; a column without any value has no future either."""
    batch, net = random_batch(B=3, T=10, missing=0.3), random_model(causal=True)
    batch.observed[2, :, 1] = False
    batch, clock = tidy(batch), torch.randn(3, 7, 4)
    for b in range(3):
        history = batch._make(x[b:b + 1] for x in batch)
        ever = history.observed.any(1, keepdim=True)
        for s in range(7):
            numbers, ids = net(create_inputs(history.rows(-12, None), causal=True)).answer()
            row = Batch(numbers[:, -1:] * ever[..., :3], ids[:, -1:] * ever[..., 3:], ever,
                        torch.ones(1, 1).bool(), clock[b:b + 1, s:s + 1], history.time[:, -1:] + 1)
            history = Batch(*(torch.cat(pair, dim=1) for pair in zip(history, row)))
        assert ever[0, 0, 1] == (b < 2)
        for together, ours in zip(net.rollout(batch, clock), history.rows(-7, None)):
            torch.testing.assert_close(together[b:b + 1], ours, atol=1e-5, rtol=1e-5)

def test_baselines_roll_out_to_what_they_are():
    t, net, args = torch.arange(21.0), random_model(causal=True), ar_args("--season 6")
    truth = torch.stack([t, t * 0.5 - 1, torch.sin(t * torch.pi / 3)], dim=-1)  # the last of a period of 6
    batch = random_batch(B=1, missing=0)._replace(numeric=truth[None, :12])
    ahead, last = truth[12:], truth[11:12].expand(9, 3)
    for name, own, expected in (("last", [0, 1, 2], last), ("linear", [0, 1], ahead), ("season", [2], ahead)):
        rows = net.rollout(batch, torch.zeros(1, 9, 4), lambda inputs: train_ar.baselines(inputs, args)[name])
        torch.testing.assert_close(rows.numeric[0, :, own], expected[:, own], atol=1e-4, rtol=0)

def test_padding_changes_nothing():
    batch, net = random_batch(B=1), random_model()
    batch.valid[:, 8:] = False
    shown = hide(tidy(batch), create_masks(batch.observed, 0.3, step_generator(0)))
    a, b = (flat(net(create_inputs(rows, causal=False))) for rows in (shown.rows(0, 8), shown))
    torch.testing.assert_close(a, b[:, :8], atol=1e-5, rtol=1e-5)

HOSTILE = {
    "as it is": lambda b: None, "one category": lambda b: b.categorical.fill_(2),
    "missing column": lambda b: b.observed[..., 0].fill_(False), "empty": lambda b: b.observed.fill_(False),
    "no row 3": lambda b: b.observed[:, 3].fill_(False), "empty window": lambda b: b.observed[0].fill_(False),
    "constant columns": lambda b: b.numeric.fill_(2.0), "a spike": lambda b: b.numeric[:, 5].fill_(1e9),
    "padding": lambda b: b.valid[:, 5:].fill_(False)}

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N,K", [(3, 2), (3, 0), (0, 2)])
@pytest.mark.parametrize("how", HOSTILE)
def test_loss_and_gradients_are_finite(how, N, K, dtype):
    batch = random_batch(N=N, K=K)
    HOSTILE[how](batch)
    for rate in (1e-9, 0.5, 0.999):                         # next to none hidden: the mean of no cells is 0/0
        net = random_model(N, K)
        loss = mean_losses(net, *ask(net, tidy(batch), case=(rate, 1)), dtype).sum()
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())

def test_loss_is_the_mean_over_scored_cells():
    net = random_model()
    inputs, targets = ask(net, random_batch(), "--mask_share 0.8 --random_share 0.1")
    prediction, chosen = net(inputs), targets.score[..., :3]
    ours, truth = (prediction.numeric / UNIT)[chosen], (targets.numeric / UNIT)[chosen]
    entropies = [F.cross_entropy(logits[here], ids[here] - 2, reduction="none") for logits, ids, here in
                 zip(prediction.logits, targets.categorical.unbind(-1), targets.score[..., 3:].unbind(-1))]
    off = (prediction.numeric - targets.numeric).abs()[chosen]                  # Laplace: off / scale + log
    likelihood = -torch.distributions.Laplace(0.0, prediction.scale[chosen]).log_prob(off) - math.log(2)
    expected = torch.stack([F.mse_loss(ours, truth), torch.cat(entropies).mean(), likelihood.mean()])
    torch.testing.assert_close(mean_losses(net, inputs, targets), expected)
    huber = model.sum_losses(prediction, targets, UNIT, "huber")[0]
    torch.testing.assert_close(huber, F.huber_loss(ours, truth, reduction="sum"))

# ---- the loop
@pytest.mark.parametrize("script,flags,rivals", [
    (train_mlm, "--base linear --mask_span 4 --eval_mask_probs 0.1 0.5", {"mean", "last", "linear", "gauss"}),
    (train_ar, "--base last --season 4 --given 16 --horizons 1 5 10", {"last", "linear", "season", "ar"})])
def test_it_learns_more_than_its_baselines(script, flags, rivals, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    history = train(toy(800, noise=0.05), tmp_path, LEARN, flags, script=script)
    assert history[-1]["val"] < 0.5 * history[0]["val"]
    found = results(tmp_path)["test"]
    tests = [found["cell"], found["span"]] if script is train_mlm else [found]
    if script is train_mlm:                                 # a line over runs is worse
        assert found["span"]["linear"]["mse"][0] > 1.2 * found["cell"]["linear"]["mse"][0]
    for test in tests:
        assert set(test) == {"model", *rivals}
        errors = {name: np.array(own.get("mse") or [own["next_mse"], *own["rollout_mse"][1:]])
                  for name, own in test.items()}
        for name in rivals - {"gauss", "ar"}:               # at every rate, and step ahead
            assert (errors["model"] < 0.8 * errors[name]).all(), name
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("loss.png", "errors.png", "window.png"))

@functools.cache
def poisoned():
    """A run with a NaN in `mirror` in its fourth step: exit code, message, the cell, folder, its weights."""
    seen, said, out = [], io.StringIO(), tempfile.TemporaryDirectory()
    def objective(batch, args, generator, step=None, case=None):
        shown, targets = OBJECTIVE(batch, args, generator, step, case)
        if step == 3:
            b, t = shown.observed[..., 1].nonzero()[0].tolist()
            seen.append(batch.numeric[b, t, 1].item())
            shown.numeric[b, t, 1] = NAN
        return shown, targets
    toy().to_csv(f"{out.name}/toy.csv", index=False)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), \
            contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as stopped:
        patch.setattr(train_mlm, "objective", objective)
        train(f"{out.name}/toy.csv", out.name, EIGHT)
    weights = torch.cat([w.flatten() for w in saved(out.name)["model"].values()])
    return stopped.value.code, said.getvalue(), seen[0], out, weights

def test_a_non_finite_gradient_stops_and_resume_ends_with_the_same_bits(finished, toy_csv, tmp_path):
    code, message, value, out, weights = poisoned()
    for said in ("step 3", "mirror: up to inf", "embed.numbers.weight", "--resume"):
        assert said in message
    row = int(re.search(r"mirror: .* in row (\d+)", message)[1])
    assert load_table(data_args("--data", toy_csv)).numeric[row, 1] == value    # that very cell
    assert code == 1 and saved(out.name)["step"] == 3 and weights.isfinite().all()   # stopped before the step
    shutil.copytree(out.name, tmp_path, dirs_exist_ok=True)
    assert len(pd.read_csv(tmp_path / "log.csv")) == 3      # written with last.pt, so the two always agree
    resume(tmp_path, "--eval_every 1 --eval_stride 3")
    assert same_bits(finished, tmp_path)                    # and how it is evaluated changes nothing
    assert pd.read_csv(tmp_path / "log.csv")["step"].tolist() == list(range(1, 9))
    resume(tmp_path, "--max_steps 9 --weight_decay 0.5")
    assert saved(tmp_path)["step"] == 9 and saved(tmp_path)["args"]["dropout"] == 0.1
    assert saved(tmp_path)["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    train(toy_csv, tmp_path, EIGHT, "--seed 1")
    assert not same_bits(finished, tmp_path)

@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=slow)])
def test_killed_at_any_moment_it_ends_with_the_same_bits(kills, toy_csv, tmp_path):
    """SIGKILL at random moments of a run that saves at every step, then Ctrl-C, then what that says to do."""
    rng, out = np.random.default_rng(kills), tmp_path / "killed"
    last, flags = out / "last.pt", words("--max_steps", 50 * (kills + 1), "--eval_every 1")
    for kill in range(kills + 1):
        was = last.stat().st_mtime_ns if kill else 0
        how = ["--resume"] if kill else [*SMALL[train_mlm], "--data", toy_csv, *flags]
        command = [sys.executable, "train_mlm.py", "--out_dir", str(out), *how]
        listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)    # in the background, too
        run = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               preexec_fn=listen)
        while not last.exists() or last.stat().st_mtime_ns == was:              # until it saves
            assert run.poll() is None, run.stdout.read()
            time.sleep(0.005)
        time.sleep(rng.random() / 5)
        run.send_signal(signal.SIGKILL if kill < kills else signal.SIGINT)
        said, _ = run.communicate(timeout=60)
        assert run.returncode == (-signal.SIGKILL if kill < kills else 130), said
    train_mlm.main(words(said.splitlines()[-1].split("train_mlm.py ")[1], "--eval_every 1000"))
    train(toy_csv, tmp_path / "whole", *flags, "--eval_every 1000")
    assert same_bits(out, tmp_path / "whole") and not list(out.glob("tmp.*"))

def test_a_full_disk_or_one_in_the_way_is_one_sentence_and_loses_nothing(finished, toy_csv, tmp_path, capsys):
    resource = pytest.importorskip("resource")              # not on Windows
    shutil.copytree(finished, tmp_path / "full")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))                   # no file may grow beyond
    try:
        refused(lambda: resume(tmp_path / "full", "--max_steps 10"), capsys, "cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    before, after = (sorted(out.glob("*.pt*")) for out in (finished, tmp_path / "full"))  # no half one
    assert [(f.name, f.read_bytes()) for f in before] == [(f.name, f.read_bytes()) for f in after]
    refused(lambda: train(toy_csv, f"{toy_csv}/out"), capsys, "out / cannot be written")
    (tmp_path / "log.csv").mkdir()
    refused(lambda: train(toy_csv, tmp_path), capsys, "log.csv / cannot be written")

def hide_what_is_high(batch, args, generator, step=None, case=None):
    """An objective without chance: how a window is hidden does not depend on its batch."""
    hidden = masking.scorable(batch) & (batch.numeric[..., :1] > 0)
    return hide(batch, hidden), masking.Targets(batch.numeric, batch.categorical, hidden)

def test_small_batches_accumulate_to_one_large_step(toy_csv, tmp_path, monkeypatch):
    """Micro-batches with different numbers of hidden cells weigh as in one batch: one division a step."""
    monkeypatch.setattr(train_mlm, "objective", hide_what_is_high)
    for name, flags in (("whole", "--batch_size 8"), ("parts", "--batch_size 2 --grad_accum 4")):
        train(toy_csv, tmp_path / name, "--max_steps 3 --warmup_steps 0", flags)
    whole, parts = (saved(tmp_path / name)["model"] for name in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize("script,base,rival", [
    (train_mlm, "closed", "gauss"), (train_mlm, "linear", "linear"),
    (train_ar, "closed", "ar"), (train_ar, "last", "last")])
def test_an_untrained_model_is_its_base_and_never_worse_on_val(script, base, rival, toy_csv, tmp_path):
    """best.pt is what val likes best: what does not help is not used."""
    history = train(toy_csv, tmp_path, "--lr 5 --max_steps 20 --eval_every 20 --base", base, script=script)
    assert saved(tmp_path, "best.pt")["step"] == 0 and history[-1]["val"] > history[0]["val"]   # ruined
    found = results(tmp_path)["test"]
    found = found.get("cell", found)
    assert found["model"] == found[rival]

@pytest.mark.parametrize("command", [
    "train_mlm.py --mask_span 1 --base linear --mask_spread 0 --seq_len 1", "train_mlm.py --dtype float16",
    "train_mlm.py --mask_share 0.8 --random_share 0.1 --mask_prob_start 0.05 --categorical_cols wave",
    "train_mlm.py --mask_prob 0.6 --mask_span 3 --loss huber --grad_accum 2 --seq_len 100000 --mixup 0.5",
    "train_mlm.py --mask_prob 0.08 --eval_mask_probs 0.1 --mask_span 1.2 --dtype bfloat16 --drop_cols date",
    "train_mlm.py --mask_prob 0.95 --score observed --drop_cols sign", "train_mlm.py --max_steps 0",
    "train_ar.py --dtype bfloat16 --loss huber", "train_ar.py --mixup 0.5 --noise 0.3 --season 4"])
def test_flags_run(command, toy_csv, tmp_path, capsys):
    script, *flags = command.split()
    history = train(toy_csv, tmp_path, "--max_steps 2", *flags, script=SCRIPTS[script])
    # float16 begins with too large a loss scale: the first norms are inf, their steps left out
    finite = ("train", "val") if "float16" in flags else ("train", "val", "norm")
    assert all(math.isfinite(row[name]) for row in history for name in finite)
    assert (tmp_path / "results.json").exists() and not list(tmp_path.glob("*.png"))
    assert "pip install matplotlib" in capsys.readouterr().out

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("script", SCRIPTS.values())
@pytest.mark.parametrize("flags", ["", "--dtype float16", "--dtype float32", "--compile"])
def test_a_gpu_trains(script, flags, toy_csv, tmp_path):
    history = train(toy_csv, tmp_path, "--device cuda --max_steps 20", flags, script=script)
    assert math.isfinite(history[-1]["val"]) and history[-1]["val"] < 1.1 * history[0]["val"]

@pytest.mark.parametrize("script", SCRIPTS.values())
def test_planets_and_a_table_without_numbers_are_drawn(script, toy_csv, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    monkeypatch.setitem(data.SIMULATIONS, "planets", lambda: data.simulate_planets(20))
    monkeypatch.chdir(tmp_path)
    Path("planets").mkdir()                               # of the name of a simulation, which is then written
    write = "--fill own.csv" if script is train_mlm else "--forecast 3 --to own.csv"
    train("planets", "drawn", "--seq_len 20", write, script=script)
    assert Path("drawn/window.png").stat().st_size > 5000 and len(pd.read_csv("own.csv")) > 59  # in the plane
    train(toy_csv, "bare", "--drop_cols wave mirror", script=script)
    assert len(list(Path("bare").glob("*.png"))) == 3

def test_help_lists_every_flag_with_help_and_default():
    text = re.sub(r"\s+", " ", MLM.format_help())
    for action in MLM._actions[1:]:
        assert action.help and action.option_strings[0] in text, action.dest
        assert f"(default: {action.default})" in text, action.dest

def test_below_the_marker_the_two_scripts_are_one():
    """Forking one of them? Then this test has done its work: delete it."""
    bottoms = [(ROOT / name).read_text().split("# ---- from here to the end")[1] for name in SCRIPTS]
    assert bottoms[0] == bottoms[1]
    ours, theirs = vars(mlm_args()), vars(ar_args())        # flags and defaults, in the order of --help
    common = [name for name in ours if name in theirs]
    assert common == [name for name in theirs if name in ours]
    own = {"data", "out_dir", "max_steps", "category_weight", "base", "cycles", "lr"}
    assert own == {name for name in common if ours[name] != theirs[name]}

@pytest.mark.parametrize("name,lines,characters,tokens", [
    ("data.py", 1245, 47, 12.65), ("masking.py", 355, 42, 12.5), ("model.py", 388, 43, 12.5),
    ("train_mlm.py", 445, 48, 12), ("train_ar.py", 512, 47.5, 12.4)])
def test_the_files_stay_small_and_plain(name, lines, characters, tokens):
    source = (ROOT / name).read_text()
    every = list(tokenize.generate_tokens(io.StringIO(source).readline))
    code = [token for token in every
            if token.type != tokenize.COMMENT and token.string.strip() and not token.string.startswith('"""')]
    rows = {token.start[0]: token.line.split("  #")[0].strip() for token in code}
    assert source.count("\n") <= lines and len(code) / len(rows) <= tokens
    assert np.mean([len(line) for line in rows.values()]) <= characters
    assert sum(token.type == tokenize.COMMENT for token in every) > 0.29 * len(rows)
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert all(f.end_lineno - f.lineno <= 50 for f in functions if f.name != "main")

def test_a_roll_out_asks_for_test_rows_alone():
    table = table_of({"x": np.arange(300.0)})
    windows, room = train_ar.rollout_windows(table, "test", ar_args("--given 10 --eval_stride 1"))
    windows = windows[room >= 19]
    rows = own_units(table, table.batch(windows).rows(0, 29).numeric)[..., 0].round()
    assert rows[:, 10:].min() == 255 and rows.max() == 299  # the test rows, all of them
    assert rows[0, 0] == 245                                # naive starts: 159 to 204
    table = table_of(data.simulate_planets(60), "--data planets")               # rows 0 to 9 of each system
    windows, room = train_ar.rollout_windows(table, "test", ar_args("--eval_stride 59"))
    assert torch.equal(windows, table.segments["test"]) and room.min() >= 19

def test_a_roll_out_uses_as_much_of_the_correction_as_val_likes():
    table = table_of(dict(zip("abc", random_rows().T.numpy())), "--seq_len 12")
    net = model.TableTransformer(model.Config(3, [], 0, 12, 1, 2, 16, causal=True)).eval()
    for std, expected in ((0.0, 1.0), (1.0, 0.0)):          # a harmless correction, and a wild one
        torch.nn.init.normal_(net.numeric_head.weight, std=std)
        train_ar.fit_trust(net, table, ar_args("--given 4 --horizons 3 --eval_stride 4"))
        assert net.trust == expected

# ---- bad input: one sentence, exit code 2, nothing overwritten
BAD_FILES = [
    ("", "bad.csv"), ("a,b\n", "no rows"), ("a,b\n1,2\n", "--split"), ("a;b\n1;2\n", "--sep"),
    ("t;a;b\n2024;20,5;1,2\n", "--sep"), ("t,a\n" + "2024-01-01,2,\n" * 9, "more cells"),
    ("t,a\n" + "".join(f"{i},2024-01-0{i + 1},2\n" for i in range(9)), "more cells"),      # row names
    ("date\n2024-01-01\n2024-01-02\n", "no usable column"),
    ("x,y\n" + '"1,205",1\n' + "7,1\n" * 60, "1,205 / --thousands"),
    ("x,y\n" + "<1,1\n7,1\n8,2\n" * 9, "<1 / --na_values"), ("x,y\n" + '"$1,205",1\n' * 9, "$1,205 / x"),
    ("at t\n" + "2024-01-01 2\n" * 9, "--sep ' '"),
    ("t,x\nUTC,m/s\n" + "".join(f"2024-01-{i},{i}\n" for i in range(10, 32)), "'t' / UTC")]
BAD_FLAGS = [
    ("--time_col sign", "sign"), ("--split inf 1 1", "--split"), ("--split nan 1 1", "--split"),
    ("--split 390 10 0", "--split"), ("--split 500 10 10", "--split"), ("--split 0.7 0.2 0.2", "--split"),
    ("--time_col nope", "nope"), ("--drop_cols nope", "nope / wave"), ("--mask_pro 0.2", "--mask_pro"),
    ("--mask_prob 0", "--mask_prob"), ("--mask_prob 1", "--mask_prob"), ("--mask_span 0.5", "--mask_span"),
    ("--mask_style span", "--mask_span"), ("--resume", "no such checkpoint"), ("--clip 0", "--clip"),
    ("--data nowhere.csv", "no such file"), ("--fill x.xlsx", ".csv"),
    ("--n_embd 30 --n_head 4", "--n_embd 30 / --n_head 4"),
    ("--mask_share 0.8 --random_share 0.3", "--random_share"), ("--device cuda:99", "--device"),
    ("--fill nowhere/filled.csv", "--fill / nowhere"), ("--numeric_cols sign", "sign / number"),
    ("--sep '\\s+'", "--sep / choose"), ("--fill a.csv --intervals ./a.csv", "--intervals ./a.csv")]

BAD = [(content, "", says) for content, says in BAD_FILES] + [(toy().to_csv(), *row) for row in BAD_FLAGS]

@pytest.mark.parametrize("content,flags,says", BAD, ids=[says for _, _, says in BAD])
def test_a_bad_file_and_a_bad_flag_are_one_sentence(content, flags, says, tmp_path, capsys):
    (tmp_path / "bad.csv").write_text(content)
    refused(lambda: train(tmp_path / "bad.csv", tmp_path / "out", flags), capsys, says)
    assert not (tmp_path / "out").exists()

def test_a_checkpoint_of_another_table_or_none_is_refused_and_kept(finished, toy_csv, tmp_path, capsys):
    before = {f.name: f.read_bytes() for f in finished.iterdir()}
    toy(seed=5).rename(columns={"wave": "surf"}).to_csv(tmp_path / "other.csv", index=False)
    refused(lambda: resume(finished, "--data", tmp_path / "other.csv"), capsys, "wave")
    for flags in ("--n_embd 32", "--n_head 4"):             # the weights of the second would fit
        refused(lambda: resume(finished, flags), capsys, "another shape")
    refused(lambda: resume(finished, script=train_ar), capsys, "train_ar.py")
    assert before == {f.name: f.read_bytes() for f in finished.iterdir()}
    torch.save({"weights": torch.ones(2)}, tmp_path / "theirs.pt")
    for found in (before["last.pt"][:1000], (tmp_path / "theirs.pt").read_bytes()):
        (tmp_path / "last.pt").write_bytes(found)
        refused(lambda: resume(tmp_path), capsys, "cannot be read")

def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)
    for save in (torch.save, lambda it, path: path.write_bytes(pickle.dumps(it, protocol=2))):
        save({"model": Malicious()}, tmp_path / "last.pt")
        refused(lambda: resume(tmp_path), capsys, "cannot be read")
    assert not (tmp_path / "owned").exists()
    with contextlib.suppress(Exception):                    # naive
        torch.load(tmp_path / "last.pt", weights_only=False)
    assert (tmp_path / "owned").exists()

# ---- the user's own file: filled, continued, as it was
def own_file(seed, folder):
    """A file in a manner of real exports, by chance: its path, its flags, and the format of its times. The
    last columns are the time, numbers with a decimal, counts, a category, and one without values."""
    rng = np.random.default_rng(seed)
    european, zipped, grouped, shuffled, doubled, indexed = (rng.random(6) < 0.4).tolist()
    rows, own = int(rng.integers(80, 200)), ["share", "count", "state"]
    form = ["%Y-%m-%d %H:%M", "%d.%m.%Y %H:%M", "%m/%d/%Y %H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"][rng.integers(4)]
    states = [["on", "off", "naïve;\rquoted, so"], ["TRUE", "FALSE"], ["007", "7"], ["1.0", "2.0"]][seed % 4]
    stamps = pd.date_range("2024-01-01", periods=rows, freq=["h", "D", "15min"][rng.integers(3)])
    frame = pd.DataFrame({"t": stamps.strftime(form), "count": rng.poisson(2, rows).astype(str),
                          "state": rng.choice(states, rows), "none": ""})
    frame.insert(1, "share", [f"{x:,.1f}" for x in rng.uniform(0, 100, rows) + 1000 * european])
    if seed % 4 == 3 and not grouped:
        frame.loc[rows - 2:, "state"] = "2.5"               # not seen in train: it must not make 1.0 of 1
    frame[own] = frame[own].mask(rng.random((rows, 3)) < 0.2, ["", "?", "-999", "NA"][rng.integers(4)])
    frame.loc[5::30, "count"] = "n.d."                      # a word among numbers stays, and is no hole
    frame.loc[rng.random(rows) < 0.03] = ""
    flags = f"--na_values -999 --categorical_cols state --time_format '{form}'"
    if grouped:
        frame.insert(0, "well", [f"{i % 4:03d}" for i in range(rows)])
        flags += " --group_col well"
    if shuffled:
        frame = frame.sample(frac=1, random_state=seed)
    if doubled:
        frame = pd.concat([frame, frame.iloc[:5]])
    manner = {"encoding": "utf-8-sig"}
    if european:
        frame["share"] = frame["share"].str.translate(str.maketrans(",.", ".,"))            # 1.057,3
        flags += " --sep ';' --decimal , --thousands . --encoding cp1252"
        manner = {"sep": ";", "encoding": "cp1252", "lineterminator": "\r\n"}
    path = folder / ("in.csv.gz" if zipped else "in.csv")
    frame.to_csv(path, index=indexed, **manner)
    return path, flags, form

@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=slow) for seed in range(8, 200))])
def test_no_cell_that_was_there_changes_and_none_is_written_that_cannot_be(seed, tmp_path, capsys):
    path, flags, form = own_file(seed, tmp_path)
    flags += " --max_steps 2 --lr 1 --warmup_steps 0"
    filled, ahead = tmp_path / "filled.csv.gz", tmp_path / "next.csv"
    train(path, tmp_path / "out", flags, "--fill", filled)
    said = capsys.readouterr().out
    train(path, tmp_path / "ar", flags, "--forecast 4 --to", ahead, script=train_ar)
    manner = {"sep": ";", "encoding": "cp1252"} if "--sep" in flags else {"encoding": "utf-8-sig"}
    before, after, ahead = (pd.read_csv(name, header=None, dtype=str, keep_default_na=False, **manner)
                            for name in (path, filled, ahead))                  # as written, by position
    t, *values, none = before.columns[-5:]                  # values: share, count, state
    holes = before.isin(["", "?", "-999", "NA"])
    holes.loc[before[t] == ""] = False                      # a row without a time stays as it is
    holes.loc[:, ~before.columns.isin(values)] = False
    assert ((after == before) | holes).all(axis=None) and (ahead.iloc[0] == before.iloc[0]).all()
    counts = re.findall(r"^(?:share|count|state) +(\d+) ", said[said.index("filled cells"):], re.M)
    assert sum(map(int, counts)) == holes.sum().sum() and "none is left empty" in said      # says what it did
    decimal = "," if "decimal" in flags else "."
    for cells, highest in ((after.where(holes), 1100 if decimal == "," else 100), (ahead[1:], math.inf)):
        share, count, state = (cells[j].dropna() for j in values)
        assert share.str.fullmatch(rf"\d+\{decimal}\d").all() and count.str.fullmatch(r"\d+").all()
        assert share.str.replace(",", ".").astype(float).max() <= highest
        assert {*state} <= {*before[values[2]][1:]} - {"", "?", "-999", "NA", "2.5"}
    group = t - 1 if "group_col" in flags else none
    was, coming = (pd.to_datetime(cells[t][1:].replace("", None), format=form).groupby(cells[group])
                   for cells in (before, ahead))            # the stamps of each sequence
    assert (coming.min() - was.max() == coming.diff().median()).sum() == coming.ngroups

DAYS = pd.date_range("2022-01-01", periods=120)
HOURS = pd.date_range("2018-01-01", periods=120, freq="h")  # no day beyond 12: even steps tell day and month
MONTHS = pd.date_range("2000-01-01", periods=120, freq="MS")
WORKDAYS = pd.bdate_range("2023-01-02", periods=140)
TIMES = [   # what public files were like that once went wrong: header, times as written, flags, what is next
    ("date", DAYS.strftime("%Y%m%d"), "", "20220501"),
    ("year,month,day", [f"{t.year},{t.month},{t.day}" for t in DAYS], "", "2022,5,1"),
    ("year,month,day", [f"{t.year},{t.month},{t.day}" for t in DAYS[:30]], "", "2022,1,31"),
    ("Year,Month", MONTHS.strftime("%Y,%m"), "", "2010,01"),
    ("Date,Time", HOURS.strftime("%Y-%m-%d,%H:%M:%S"), "", "2018-01-06,00:00:00"),
    ("Day,Clock", HOURS.strftime("%d.%m.%Y,%H:%M"), "--time_col Day Clock", "06.01.2018,00:00"),
    ("Date", MONTHS.strftime('"%B %d, %Y"'), "", '"January 01, 2010"'),
    ("Date", DAYS[::-1].strftime("%d-%b-%Y"), "", "01-May-2022"),
    ("timestamp", HOURS.astype("datetime64[s]").astype("int64"), "", "1515196800"),
    ("t", HOURS.strftime("%d/%m/%Y %H:%M"), "", "06/01/2018 00:00"),
    ("t", (MONTHS + pd.Timedelta(days=14)).astype(str), "", "2010-01-15"),
    ("t", [f"{t.month}/{t.day}/{t.year}" for t in MONTHS[::3]], "", "1/1/2010"),
    ("time", HOURS.strftime("%Y%m%d%H%M"), "", "201801060000"),
    ("date", [f"{t.year}/{t.month}/{t.day}" for t in DAYS], "", "2022/5/1"),
    ("date", DAYS.strftime("%m/%d/%y"), "", "05/01/22"),
    ("Date,Time", HOURS.strftime("%d/%m/%Y,%H.%M.%S"), "", "06/01/2018,00.00.00"),
    ("t", HOURS.strftime("%Y-%m-%dT%H:%M:%S.000Z"), "", "2018-01-06T00:00:00.000Z"),
    ("Date,Hour", [f"{t:%d.%m.%Y},{t.hour}" for t in HOURS], "--time_col Date Hour", "06.01.2018,0"),
    ("Date,Hour", [f"{t:%d.%m.%Y},{t.hour}" for t in HOURS], "", "refused: --forecast / --time_col"),
    ("t", HOURS[(HOURS.hour > 9) & (HOURS.hour < 18)].strftime("%Y-%m-%d %H:%M"), "", "2018-01-05 18:00"),
    ("t", [f"{i / 10:g}" for i in range(120)], "--time_col t", "12.0"),
    ("t,installed", HOURS.strftime("%Y-%m-%d %H:%M,2017-05-01"), "", "refused: --time_col"),
    ("t,installed", HOURS.strftime("%Y-%m-%d %H:%M,2017-05-01"), "--time_col t", "2018-01-06 00:00,"),
    ("t", WORKDAYS[:120].astype(str), "", "2023-06-19"),
    ("month", MONTHS.strftime("%Y%m"), "", "201001"),
    ("t", [f"{t.day}.{t.month}.{t.year} {t:%H:%M}" for t in HOURS], "", "6.1.2018 00:00"),
    ("t", WORKDAYS[:120].drop("2023-06-13").astype(str), "", "2023-06-19"),       # a holiday among the last
    ("t", WORKDAYS[np.arange(140) % 9 > 0].astype(str), "", "2023-07-17"),
    ("t", DAYS[DAYS.day_of_week < 6].astype(str), "", "2022-05-02"),              # shut on Sundays
    ("t", MONTHS.drop(MONTHS[[7, 115]]).shift(1, "ME").astype(str), "", "2010-01-31"),
    ("t", pd.date_range("2010-01-01", periods=120, freq="BME").delete(115).astype(str), "", "2020-01-31"),
    ("t", pd.date_range("2010-01-01", periods=120, freq=pd.offsets.LastWeekOfMonth(weekday=4)).astype(str),
     "", "refused: --forecast"),                            # pandas takes it for the fourth Friday
    ("date,stamp", [f"{t:%Y-%m-%d},{t:%d.%m.%Y %H:%M}" for t in HOURS], "", "refused: --time_col"),
    ("Zeit", [f"{t.day}. {'Jän Feb Mär Apr'.split()[t.month - 1]} 22" for t in DAYS], "", "refused: Zeit"),
    ("t", DAYS.strftime("%d%m%Y"), "", "01052022"),
    ("t", DAYS.strftime("%y/%m/%d"), "", "22/05/01"),
    ("period", MONTHS.strftime("%Y%m"), "--time_col period", "201001"),
    ("t", [f"{y}-12-{day}" for y in range(2010, 2020) for day in range(20, 32)], "", "2020-01-01"),   # pauses
    ("date,took", [f"{t:%Y-%m-%d},{7 + t.day % 3}:{t.day:02d}" for t in DAYS], "", "refused: --time_col"),
    ("t", [f"{t.day}-{t:%b-%Y %I:%M %p}" for t in HOURS], "", "6-Jan-2018 12:00 AM"),
    ("t", [f"{t.replace(day=min(30, t.days_in_month)):%Y-%m-%d}" for t in MONTHS[:-3]], "", "2009-10-30"),
    ("t", [f"{i} days 00:00:00" for i in range(120)], "", "refused: 't' / --drop_cols"),
    ("t", range(1000, 1120), "--time_format %H", "refused: --time_col"),
    ("t", [f"{i:04d}" for i in range(120)], "--time_col t", "120"),
    ("t", DAYS.strftime("%y|%d|%m"), "--time_col t --time_format '%y|%d|%m'", "22|01|05"),
    ("t", [f"2024-W{i % 52 + 1:02d}" for i in range(120)], "", "refused: 't' / --time_format"),
    ("t", [f"03/02/2024 {t:%H:%M}" for t in HOURS[:24]], "", "refused: --time_format"),     # either way
    ("MTU (CET)", [f"{t:%d.%m.%Y %H:%M} - {t:%H:%M}" for t in HOURS], "", "refused: MTU (CET) / --drop_cols"),
    ("Time", HOURS.strftime("%H:%M"), "", "refused: Time / --time_col"),
    ("t", DAYS[:12].strftime("%m/%d/%Y"), "", "refused: --time_format"),       # twelve days, or twelve months
    ("t", HOURS.strftime("%Y-%m-%d"), "--time_format %Q", "refused: --time_format '%Q'"),
    ("date", DAYS.strftime("%Y%m%d.0"), "", "refused: date / --time_format"),
    ("Date,Time", HOURS.strftime("%m/%d/%Y,%I:%M %p"), "", "01/06/2018,12:00 AM"),
    ("t", DAYS.strftime("%d-%b-%Y").str.upper(), "", "01-MAY-2022"),
    ("t", HOURS.strftime("%Y-%m-%d %H:%M:%S.0000000"), "", "2018-01-06 00:00:00.0000000"),
    ("ts", [f"{i}.0" for i in range(1641174600, 1641246600, 600)], "", "1641246600.0"),
    ("YEAR,DOY", [f"{t.year},{t.day_of_year}" for t in DAYS], "", "2022,121"),
    ("time", MONTHS.strftime("%m.%Y"), "", "01.2010"),
    ("when", HOURS.strftime("%Y%m%d %H%M%S"), "", "20180106 000000"),
    ("Title", MONTHS.strftime("%Y %b").str.upper(), "", "2010 JAN"),
    ("Date,Time", [f"17/06/2018,{i // 60:02d}:{i % 60:02d}" for i in range(120)], "", "17/06/2018,02:00"),
    ("t", HOURS.strftime("%Y-%m-%d %H:%M:%S.000 +0200"), "", "2018-01-06 00:00:00.000 +0200"),
    ("t", HOURS.strftime("%H:%M - %H:%M"), "--time_format '%H:%M - %H:%M'", "refused: --time_format"),
    ("Month", pd.date_range("1960-01-01", periods=200, freq="MS").strftime("%b-%y"), "", "Sep-76"),
    ("date", DAYS.strftime("%y%m%d"), "", "220501"),
    ("t", ["2024-01-01"] * 5 + ["24:00"] + ["2024-01-02"] * 90, "", "refused: 't' / 24:00"),
    ("week", [f"{y}{week:02d}" for y in (2021, 2022) for week in range(1, 53)], "", "refused: week"),
    ("t", WORKDAYS[WORKDAYS.day_of_week.isin([0, 2, 4])].astype(str), "", "2023-07-17"),
    ("t", ["2024-01-01"] * 120, "", "refused: --forecast / --group_col")]

@pytest.mark.parametrize("header,times,flags,coming", TIMES, ids=[row[-1] for row in TIMES])
def test_time_goes_on_as_the_file_writes_it_or_is_refused(header, times, flags, coming, tmp_path, capsys):
    lines = [f"{t},{20 + 5 * np.sin(i / 5):.1f}" for i, t in enumerate(times)]
    (tmp_path / "in.csv").write_text("\n".join([f"{header},x", *lines, ""]))
    run = lambda: train(tmp_path / "in.csv", tmp_path / "out", flags, "--max_steps 0 --forecast 3 --to",
                        tmp_path / "next.csv", script=train_ar)
    if coming.startswith("refused: "):
        refused(run, capsys, coming.removeprefix("refused: "))
        assert not (tmp_path / "out").exists()              # before training
    else:
        run()
        first, second, *_ = (tmp_path / "next.csv").read_text().splitlines()
        assert first == f"{header},x" and second.rpartition(",")[0] == coming

def test_intervals_hold_what_they_say_and_widen_with_the_horizon(tmp_path):
    truth = pd.DataFrame(random_rows(1500).numpy().round(4), columns=list("abc"))
    holes = np.random.default_rng(0).random(truth.shape) < 0.1
    holes[holes.all(axis=1)] = False                        # a blank row would stay as it is
    gaps = ("--intervals", tmp_path / "gaps.csv")
    filled = fill(truth.mask(holes), tmp_path, "--seq_len 32 --max_steps 10", *gaps)
    lines = pd.read_csv(tmp_path / "gaps.csv").set_index(["column", "row"])
    said, true = (frame.unstack()[lines.index] for frame in (filled, truth))
    assert len(lines) == holes.sum() and (lines["value"] == said).all()
    assert true.between(lines["low"], lines["high"]).mean() == pytest.approx(0.9, abs=0.03)
    rng = np.random.default_rng(0)
    walk = {"x": rng.standard_normal(600).cumsum().round(3), "c": rng.choice(["a", "b"], 600)}
    forecast(pd.DataFrame(walk), tmp_path, 9, *gaps)
    lines = pd.read_csv(tmp_path / "gaps.csv").set_index(["column", "row"])
    width = lines["high"]["x"].astype(float) - lines["low"]["x"].astype(float)
    assert 2 < width[8] / width[0] < 4                      # a walk is three times as far after nine steps
    assert lines["probability"]["x"].eq(0.9).all() and lines["probability"]["c"].between(0.3, 1).all()

def test_levels_beyond_the_train_rows_are_filled_between_neighbours_and_go_on(tmp_path):
    level, holes = np.exp(np.arange(300) / 40), [270, 280, 281, 290]
    frame = pd.DataFrame({"day": pd.date_range("2020-01-01", periods=300), "cases": level.round()})
    frame.loc[holes, "cases"] = np.nan
    assert (fill(frame, tmp_path)["cases"] / level)[holes].between(0.8, 1.2).all()
    assert (forecast(frame, tmp_path, 3)["cases"].astype(float) / level[-1]).between(0.9, 1.2).all()

def test_rows_without_a_stamp_stay_and_say_nothing(tmp_path, capsys):
    frame = pd.DataFrame({"t": HOURS.astype(str), "x": np.arange(120.0)})
    frame.loc[10, "t"] = np.nan
    frame.loc[[10, 50], "x"] = np.nan
    filled = fill(frame, tmp_path)
    assert filled.isna().sum().tolist() == [1, 1] and abs(filled["x"][50] - 50) < 3
    assert "1 rows" in capsys.readouterr().out
    ahead = forecast(frame, tmp_path, 2, "--base last")["x"].astype(float)
    assert ahead.between(115, 125).all()                    # from the end, not from row 10

def test_absent_rows_are_counted_and_inserted_and_runs_of_holes_measured(tmp_path, capsys):
    frame = toy(200)[["date", "wave"]].drop(index=[50, 51, 120])
    data.describe(table_of(frame), data_args())
    assert "3 absent" in (said := capsys.readouterr().out) and "--regular" in said
    filled, kept = fill(frame, tmp_path, "--regular"), frame["wave"].dropna()
    assert (pd.to_datetime(filled["date"]) == toy(200)["date"]).all() and filled["wave"].notna().all()
    assert (filled["wave"][kept.index] == kept).all()
    tenths = pd.Series(range(200)).drop([50, 51]) / 10      # in floats not quite a tenth apart
    assert len(table_of({"t": tenths, "x": 1.0}, "--time_col t --regular").observed) == 200
    reset = [pd.Timestamp(0), *pd.date_range("2024-01-01", periods=200, freq="s")]
    assert data.absent_steps(table_of({"t": reset, "x": 1.0}))[0] < 200         # naive: billions
    uneven = {"t": toy(200)["date"] + pd.to_timedelta(np.arange(200) ** 2, unit="s"), "x": 1.0}
    refused(lambda: table_of(uneven, "--regular"), capsys, "--regular")
    outages = toy().drop(columns="sign").mask(np.arange(400)[:, None] % 40 < [[0, 8, 8]])   # no values
    assert 3 < data.default_span(table_of(outages, "--seq_len 64")) < 8
    assert data.default_span(table_of(toy(), "--seq_len 64")) < 2

def test_what_the_first_thousand_rows_do_not_show(tmp_path):
    """Codes and true or false that begin late stay as they are spelt."""
    late = {"switch": [""] * 1100 + ["TRUE", ""] * 450, "zip": ["99084"] * 1100 + ["01067", ""] * 450}
    fill(pd.DataFrame({"x": np.arange(2000) / 4, **late}), tmp_path)
    filled = pd.read_csv(tmp_path / "filled.csv", dtype=str)
    assert set(filled["switch"]) == {"TRUE"} and set(filled["zip"]) == {"99084", "01067"}

def test_one_column_with_blank_lines_for_holes(tmp_path):
    (tmp_path / "in.csv").write_text("x\n" + "".join(f"{i}.25\n\n" for i in range(60)))
    train(tmp_path / "in.csv", tmp_path, "--fill", tmp_path / "out.csv")
    before, after = ((tmp_path / name).read_text().splitlines() for name in ("in.csv", "out.csv"))
    assert all(new == old or not old for old, new in zip(before, after, strict=True))

def test_describe_fits_on_a_screen(capsys):
    data.describe(table_of({f"c{i}": np.arange(200.0) for i in range(80)}), data_args())
    assert len(capsys.readouterr().out.splitlines()) <= 30

def test_hints_name_their_flag_and_unlike_groups_are_not_filled(tmp_path, capsys):
    rng = np.random.default_rng(0)
    def hints(frame, *flags):
        return " ".join(data.find_hints(table_of(frame, "--seq_len 8", *flags), data_args(*flags)))
    long = {"t": np.repeat(HOURS, 3), "what": ["HR", "BP", "T"] * 120, "x": 1.0}
    assert "--group_col what" in hints(long) and "--group_col" not in hints(long, "--group_col what")
    assert "--drop_cols id" in hints({"id": [f"no. {i}" for i in range(200)], "x": 1.0})
    assert "such as 'n.d.'" in hints({"x": ["n.d.", *range(60)]})
    spoilt = pd.DataFrame(rng.normal(50, 3, (200, 3)), columns=list("abc"))
    assert "--na_values -200" in hints(spoilt.mask(rng.random((200, 3)) < 0.1, -200)) and hints(spoilt) == ""
    unlike = pd.DataFrame({"g": np.repeat(list("abcd"), 60), "x": rng.uniform(1, 2, 240)})
    for times in (100, 1e6):                                # named; and refused where it would be noise
        unlike["x"] *= np.where(unlike["g"] == "d", 1, times)
        assert "x" in hints(unlike, "--group_col g")
    levels = rng.normal(0, 1, 120) + np.repeat([0, 1e6], 60)
    apart = pd.DataFrame({"g": np.repeat(list("ab"), 60), "x": levels})
    for frame in (unlike, apart):
        refused(lambda: fill(frame, tmp_path, "--group_col g"), capsys, "'x' / group")

def test_parquet_is_filled_into_a_csv(tmp_path):
    pytest.importorskip("pyarrow")
    frame = toy().assign(whole=pd.Series([3, None] * 200, dtype="Int64"))
    for kept in (frame.set_index("date"), frame.set_index(pd.RangeIndex(400))[50:]):    # dates, and a slice
        kept.to_parquet(tmp_path / "toy.parquet")
        train(tmp_path / "toy.parquet", tmp_path, "--fill", tmp_path / "filled.csv")
        filled = pd.read_csv(tmp_path / "filled.csv", parse_dates=["date"], float_precision="round_trip")
        own = frame[["date", "wave"]][-len(filled):].reset_index(drop=True)
        assert filled["wave"].notna().all() and (filled["whole"] == 3).all()
        assert ((filled[["date", "wave"]] == own) | own.isna()).all(axis=None)  # to the bit

def test_resuming_fills_another_file_by_the_scales_of_training_and_only_fills(finished, tmp_path):
    other, path = toy(200, seed=3).assign(wave=lambda frame: frame["wave"] * 2 + 3), tmp_path / "other.csv"
    other.to_csv(path, index=False)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "last.pt").read_bytes()
    resume(tmp_path, "--data", path, "--fill", tmp_path / "filled.csv")
    assert (tmp_path / "last.pt").read_bytes() == before    # and its flags: the next --resume is of the first
    assert same_bits(finished, tmp_path) and saved(tmp_path)["schema"] == saved(finished)["schema"]
    table = load_table(mlm_args("--seq_len 16 --data", path), schema=data.Schema(**saved(finished)["schema"]))
    filled, there = pd.read_csv(tmp_path / "filled.csv"), other["wave"].notna()
    own = own_units(table, table.numeric)[:, 0].numpy()                    # by the old scales
    assert filled.notna().all(axis=None) and np.allclose(own[there], other["wave"][there], rtol=1e-4)
    one = other.assign(mirror=np.nan, sign=other["sign"].mask(other["sign"] == "up"))
    one.to_csv(tmp_path / "one.csv", index=False)           # has no value of `mirror`, and one sign alone
    resume(tmp_path, "--data", tmp_path / "one.csv", "--fill", tmp_path / "filled.csv")
    found = pd.read_csv(tmp_path / "filled.csv")
    assert found["mirror"].isna().all() and set(found["sign"]) <= {"up", "down"}
    net = saved_model(tmp_path)
    for row in np.flatnonzero(~there[:184])[2:]:            # from a window with a quarter of itself before
        windows = torch.tensor([[first, 200] for first in range(row // 8 * 8 - 8, row - 3, 8)])
        said = own_units(table, net.predict(net.inputs(table.batch(windows)))[0])[..., 0]
        said = said[range(len(windows)), row - windows[:, 0]]
        assert np.isclose(filled["wave"][row], said, atol=1e-5).any()

def test_the_forecast_is_the_roll_out_from_the_last_rows_also_after_a_resume(tmp_path):
    """Without dropout; a column empty in train has no future."""
    frame, flags = toy().assign(late=[None] * 350 + ["p"] * 50), "--drop_cols date --dropout 0.5"
    rows, path = forecast(frame, tmp_path, 3, flags), tmp_path / "ar.csv"
    table = load_table(ar_args("--seq_len 16 --drop_cols date --data", path))
    last = table.batch(torch.tensor([[384, 400]]))
    ahead = saved_model(tmp_path / "ar").rollout(last, torch.zeros(1, 3, 0))
    assert np.allclose(rows["wave"].astype(float), own_units(table, ahead.numeric[0])[:, 0], atol=1e-5)
    assert list(rows) == list(frame) and rows[["date", "late"]].isna().all(axis=None)
    train(path, tmp_path / "parts", flags, "--max_steps 2", script=train_ar)    # all warmup
    assert not same_bits(tmp_path / "ar", tmp_path / "parts")
    resume(tmp_path / "parts", "--max_steps 4 --forecast 3 --to", tmp_path / "again.csv", script=train_ar)
    assert same_bits(tmp_path / "ar", tmp_path / "parts")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "next.csv").read_bytes()

def hostile_column(rng, rows):
    """Values as a file might hold them, no worse than what has been seen in the wild."""
    n = rng.standard_normal(rows)
    columns = [
        n, (100 * n).round(), [2 ** 60 + i for i in range(rows)], n > 0, [7] * rows, [""] * rows,
        np.where(n > 1, np.inf, n), np.where(n > 1, -1.18e42, n), np.where(n > 0, "on", "off"),
        [f"{x:.2f}".replace(".", ",") for x in n], ["x" * 5000] * rows, [f"id{i}" for i in range(rows)],
        pd.date_range("2024-01-01", periods=rows, freq="h").astype(str),
        rng.choice(["9999-12-31", "0001-01-01", "2024-02-30", "2024-01-01", ""], rows),
        rng.choice(["1", "x", "nan", "2024-01-01", "True", "-", "1e400"], rows),
        rng.choice(["äöü", "日本", "🙂", "a,b", 'quo"te', "", " "], rows)]
    column = pd.Series(columns[rng.integers(len(columns))], dtype=object)
    return column.mask(pd.Series(rng.random(rows) < rng.choice([0, 0.1, 0.9])), "")

@pytest.mark.parametrize("seed", [*range(25), *(pytest.param(i, marks=slow) for i in range(25, 330))])
def test_hostile_input_ends_well(seed, finished, tmp_path, capsys):
    rng = np.random.default_rng(seed)
    rows = int(rng.choice([1, 9, 60, 300, 300]))
    names = rng.choice(["a", "a", "b", "", " ", "日本", "$x_1$", "Unnamed: 0", "nan", "x_x", "x_y", "'"], 5)
    table = pd.concat([hostile_column(rng, rows) for _ in names], axis=1)
    table.to_csv(tmp_path / "hostile.csv", header=names, index=False)
    extra = ["", "--seq_len 7", "--lr 0", "--split 1 1 1", "--split 0 0 1", "--clip 0.01", "--batch_size 64",
             "--dtype bfloat16 --loss huber", "--sep ';'", "--regular", "--decimal ,"]
    for flag in ("group_col", "time_col", "categorical_cols", "numeric_cols", "drop_cols"):
        extra.append(f"--{flag} {shlex.quote(str(rng.choice(names)))}")
    script, end = train_mlm, ["--fill", tmp_path / "filled.csv"]
    if rng.random() < 0.3:
        script, end = train_ar, ["--forecast 3 --to", tmp_path / "next.csv"]
    flags = ["--max_steps 2", *rng.choice(extra, 2), *end]
    run = lambda: train(tmp_path / "hostile.csv", tmp_path, *flags, script=script)
    if rng.random() < 0.2:                                  # or a checkpoint in which some bytes are others
        broken = np.frombuffer((finished / "last.pt").read_bytes(), np.uint8).copy()
        broken[rng.integers(0, len(broken), 50)] = rng.integers(0, 256, 50)
        (tmp_path / "last.pt").write_bytes(broken[:len(broken) // rng.integers(1, 3)].tobytes())
        run = lambda: resume(tmp_path, *end, script=script)
    try:
        run()
        found = (tmp_path / "results.json").read_text()
        assert "NaN" not in found and "Infinity" not in found
    except SystemExit as stopped:
        assert stopped.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]

# ---- what was claimed about a loss that went NaN, tested one claim at a time
def broken_loss(missing, rate=0.0, T=16, n_embd=16, lr=1e-3, measure=F.mse_loss):
    """The recipe that went NaN, in our model: every position is scored, against the file as it is."""
    net = model.TableTransformer(model.Config(2, [], 4, T, 1, 2, n_embd))
    optimizer = torch.optim.AdamW(net.parameters(), lr)
    batch = random_batch(4, T, 2, 0, missing)
    file = torch.where(batch.observed, batch.numeric, NAN)
    hidden = create_masks(batch.observed, rate, step_generator(0))
    inputs = create_inputs(hide(batch, hidden), causal=False)
    for _ in range(3):
        loss = measure(net(inputs).numeric, file)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss

@pytest.mark.parametrize("change", [
    {}, {"rate": 1e-5}, {"rate": 0.15}, {"T": 512}, {"n_embd": 512}, {"lr": 1e-5},
    {"measure": F.huber_loss}, {"measure": F.smooth_l1_loss}, {"measure": F.l1_loss}])
def test_claim_only_missing_targets_make_the_loss_nan(change):
    assert broken_loss(0.0, **change).isfinite() and broken_loss(0.05, **change).isnan()

def test_claim_identity_reconstruction_is_no_cause(tmp_path):
    """Scoring what is shown at a mask rate of 0.00001: useless, but as calm as can be."""
    whole = toy().ffill().bfill()
    history = train(whole, tmp_path, "--score observed --mask_prob 0.00001 --base linear --max_steps 30")
    assert max(row["norm"] for row in history) < 1 and 0 < history[-1]["train"] < 0.2
    assert history[-1]["val"] > 0.8                         # in units of interpolation: nothing was learnt

def test_claim_minus_infinity_as_a_mask_value_is_a_cause():
    x = torch.tensor([[-math.inf, 1.0, 2.0, 3.0]])
    assert not x.isnan().any()                              # so the check for NaN lets it through
    assert F.layer_norm(2 * torch.nan_to_num(x), (4,)).isnan().all()

def test_claim_causal_attention_does_not_protect():
    x = torch.randn(1, 1, 6, 4)
    x[0, 0, 2, 0] = NAN
    assert F.scaled_dot_product_attention(x, x, x, is_causal=True)[0, 0, 2:].isnan().any(-1).all()

def test_claim_rows_of_masks_belong_into_the_attention():
    """A row that is hidden whole still has a clock, and the base."""
    batch, net, hidden = random_batch(missing=0), random_model(), (torch.arange(12) == 5)[None, :, None]
    inputs = create_inputs(hide(batch, hidden), causal=False)
    said, other = net(inputs).numeric, net(inputs._replace(clock=batch.clock + hidden)).numeric
    assert torch.isfinite(said).all() and (said != other).any(-1).all()

def test_claim_attention_over_heads_does_not_learn(tmp_path, monkeypatch):
    """Nothing is NaN any more, yet no row sees another: a fifth worse than the right axis."""
    errors = []
    for attention in (F.scaled_dot_product_attention, model.over_heads):
        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
        train(toy(600, noise=0.05), tmp_path, LEARN, "--n_layer 1 --batch_size 16 --base linear")
        found = results(tmp_path)["test"]["cell"]
        errors.append(sum(found["model"]["mse"]) / sum(found["linear"]["mse"]))
    assert errors[0] < 0.8 * errors[1]

def test_claim_masks_must_have_the_layout_of_the_table():
    x = torch.arange(9.0).view(1, 3, 3)
    mask = torch.tensor([[[1, 0, 0], [1, 0, 0], [0, 0, 0]]]).bool()
    assert x[mask].tolist() == [0, 3] and x[mask.transpose(1, 2)].tolist() == [0, 1]            # other cells
    with pytest.raises(IndexError):
        torch.zeros(1, 4, 3)[mask]

def test_claim_any_is_no_test_of_validity():
    rows = torch.tensor([[0.0, 0.0], [NAN, 1.0], [NAN, NAN]])
    assert rows.any(dim=1).tolist() == [False, True, True]  # naive: a row of zeros is padding, NaN is not
    frame = pd.DataFrame({"w": list("aaabbccc"), "x": [0.0, NAN, NAN, 1, 1, 1, 1, 1]})
    table = table_of(frame, "--group_col w --split 1 1 1 --seq_len 3")
    real = [table.batch(table.starts(split, 3)).valid.sum() for split in ("train", "val", "test")]
    assert sorted(real) == [2, 3, 3]

# ---- as a user would
def commands():  # Every `python train_...` line in the README and the docstrings, without what follows a #
    names = ["README.md", *SCRIPTS, "data.py", "masking.py", "model.py"]
    text = "\n".join((ROOT / name).read_text() for name in names)
    found = re.findall(r"^ *(?:.*&& )?python (train_\w+\.py.*)$", text, re.M)
    return sorted({c.split("#")[0].strip() for c in found})

@pytest.mark.parametrize("command", commands())
def test_every_training_command_runs(command, toy_csv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                             # --fill filled.csv
    name, _, flags = command.partition(" ")
    assert SCRIPTS[name].get_parser().parse_args(words(flags))
    few = [*SMALL[SCRIPTS[name]], "--data", toy_csv]        # the last flag wins: few steps, the toy,
    few += ["--split 0.6 0.2 0.2"] * ("--split" in flags)   # not the row counts of another file
    few += ["--season 4"] * ("--season" in flags)
    if "--resume" not in flags:
        train(toy_csv, tmp_path, flags, *few, script=SCRIPTS[name])

@pytest.mark.filterwarnings("error::DeprecationWarning")
@pytest.mark.parametrize("command", ["data.py", "masking.py", "model.py", "model.py --leaks"])
def test_each_file_runs_by_itself(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) > 10

def test_imports_go_one_way():
    order = ["data", "masking", "model", "train_mlm"]
    for i, name in enumerate(order):
        imported = re.findall(r"^(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), re.M)
        assert not set(order[i:]) & set(imported)

@pytest.mark.skipif(not os.environ.get("ETTH1"), reason="set ETTH1 to the path of ETTh1.csv")
def test_linear_interpolation_on_etth1_gives_the_published_numbers(tmp_path):
    flags = words("--split 8640 2880 2880 --eval_stride 8 --max_steps 0 --out_dir", tmp_path)
    train_mlm.main(["--data", os.environ["ETTH1"], *flags])
    assert results(tmp_path)["eval_mask_probs"] == [0.125, 0.25, 0.375, 0.5]
    linear = results(tmp_path)["test"]["cell"]["linear"]["mse"]
    assert linear == pytest.approx([0.0845, 0.0996, 0.1231, 0.1644], rel=0.05)

def python(*argv, processes=1, timeout=600, fails=False):
    """Python in the folder of this file, as torchrun starts it; what it prints, or how it fails."""
    start = f"-m torch.distributed.run --standalone --nproc_per_node={processes} --no-python".split()
    command = [sys.executable, *start, sys.executable, *map(str, argv)]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=timeout)
    assert (run.returncode != 0) == fails, run.stderr
    return run.stderr if fails else run.stdout

@slow
@pytest.mark.parametrize("command", ["train_mlm.py", "train_mlm.py --drop_cols sign",
                                     "train_mlm.py --drop_cols wave mirror", "train_ar.py"])
def test_two_processes_train_one_model(command, toy_csv, tmp_path):
    name, *flags = command.split()
    python(name, *SMALL[SCRIPTS[name]], *flags, "--data", toy_csv, "--out_dir", tmp_path, processes=2)
    assert len(pd.read_csv(tmp_path / "log.csv")) == 4 and (tmp_path / "results.json").exists()

def nan_on_rank_1(*a, steps=[]):
    """model.sum_losses, but NaN in the third training step of the second process."""
    steps.append(torch.is_grad_enabled())
    return model.sum_losses(*a) * (NAN if os.environ["RANK"] == "1" and sum(steps) == 3 else 1)

@slow
def test_a_nan_on_one_rank_stops_both(toy_csv, tmp_path):
    code = ("import sys, test_all, train_mlm; train_mlm.sum_losses = test_all.nan_on_rank_1; "
            "train_mlm.main(sys.argv[1:])")
    few = [*SMALL[train_mlm], "--data", toy_csv, "--out_dir", tmp_path]
    said = python("-c", code, *few, processes=2, timeout=60, fails=True)
    assert all(f"rank {rank}: the gradient norm is not finite" in said for rank in (0, 1))
    assert saved(tmp_path)["step"] == 2

@slow
def test_two_processes_have_the_gradient_of_one_with_both_batches(toy_csv, tmp_path, monkeypatch):
    """What Adam keeps of a first gradient is a tenth of it."""
    flags = words("--max_steps 1 --grad_clip 1e9 --data", toy_csv)
    python("train_mlm.py", *SMALL[train_mlm], *flags, "--out_dir", tmp_path / "two", processes=2)
    generators = iter([step_generator(0, 0, rank) for rank in (0, 1)] * 2)      # draw windows, then masks
    real_sample, real_objective = data.Table.sample, train_mlm.objective
    def sample(table, split, size, generator):
        return real_sample(table, split, size, next(generators) if size == 4 else generator)
    def objective(batch, args, generator, step=None, case=None):
        return real_objective(batch, args, generator if case else next(generators), step, case)
    monkeypatch.setattr(data.Table, "sample", sample)
    monkeypatch.setattr(train_mlm, "objective", objective)
    train(toy_csv, tmp_path / "one", *flags, "--grad_accum 2")
    one, two = ([kept["exp_avg"] for kept in saved(tmp_path / name)["optimizer"]["state"].values()]
                for name in ("one", "two"))
    assert max(tenth.abs().max() for tenth in one) > 1e-3
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)

@slow
def test_two_million_rows_fit(tmp_path):
    big = np.random.default_rng(0).standard_normal((2_000_000, 30), dtype=np.float32).round(3)
    pd.DataFrame(big).to_csv(tmp_path / "big.csv", index=False)
    code = ("import resource, sys, train_mlm; train_mlm.main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)")
    few = words("--seq_len 1024 --batch_size 14 --split 1990000 5000 5000 --max_steps 2 --out_dir", tmp_path)
    said = python("-c", code, "--data", tmp_path / "big.csv", *few)
    assert int(said.split()[-1]) < 3 * 2_000_000 * 30 * 4 + 2 ** 30             # thrice the table, and 1 GiB

# ---- the zoo: 27 ways to a NaN, or to a wrong number; the naive form beside ours
HOLES = [1.0, NAN, 3.0, 2.0, NAN, 1.5] * 10
ONES, RAMP = torch.ones(1, 1, 3, 2), torch.tensor([1.0, 2.0, 3.0])[None, None, :, None]
NOBODY, LEFT = torch.zeros(1, 3).bool(), torch.tensor([[False, False, True]])           # valid rows
SAME, ALL = torch.full((8,), 7.0), torch.ones(1, 8, 1).bool()
CELL = masking.Targets(torch.zeros(1), torch.zeros(0).long(), torch.ones(1).bool())
may_look, PAST = masking.create_attention_mask, masking.causal_mask(3)
CODE = "".join((ROOT / name).read_text() for name in ("model.py", "masking.py", *SCRIPTS))
ZOO = {}    # number: (what, the thread in which users met it, what naive gives, what ours gives, naive, ours)

way = lambda number, *facts, naive, ours: ZOO.update({number: (*facts, naive, ours)})

def honest(rate=0.5):
    """A column with holes through all of the shipped path: its masked loss, and its largest gradient."""
    net = model.TableTransformer(model.Config(1, [], 0, 8, 1, 2, 16))
    table = table_of({"x": HOLES}, "--seq_len 8")
    loss = mean_losses(net, *ask(net, table.batch(table.starts("train", 8)), case=(rate, 1))).sum()
    loss.backward()
    return loss, max(p.grad.abs().max() for p in net.parameters() if p.grad is not None)

def slope(function, *x):                                    # The gradient of a function at x, summed
    x = torch.tensor(x, requires_grad=True)
    function(x).sum().backward()
    return x.grad.sum()

def attend(v, mask):                                        # Attention of equal queries and keys
    return model.plain_attention(torch.ones_like(v), torch.ones_like(v), v, mask)[0, 0]

def mask_and_is_causal():
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):    # which all machines have
        return F.scaled_dot_product_attention(ONES, ONES, ONES, torch.ones(3, 3).bool(), is_causal=True)

def float16_gradient(enabled):
    scaler, w = torch.amp.GradScaler("cpu", enabled=enabled), torch.ones(1, requires_grad=True)
    scaler.scale((w.half() * torch.tensor(1e-4).half()).float() * 1e-4).sum().backward()
    return w.grad / scaler.get_scale()

def descend(careful):  # 300 steps down x^4 - x^2; careful: with warmup, and a norm of 1 at most
    x, args = torch.tensor([10.0]), mlm_args("--lr 0.05 --max_steps 300 --warmup_steps 20")
    for step in range(300):
        gradient, lr = 4 * x ** 3 - 2 * x, 0.05
        if careful:
            gradient, lr = gradient.clamp(-1, 1), train_mlm.get_lr(step, args)
        x = x - lr * gradient
    return x

def clipped_by_nan():
    w = torch.nn.Parameter(torch.ones(4))
    w.grad = torch.tensor([1.0, NAN, 1.0, 1.0])
    torch.nn.utils.clip_grad_norm_(w, 1.0)
    return w.grad.isnan().float().mean()

def adam_after_nan():
    w = torch.nn.Parameter(torch.ones(1))
    adam = torch.optim.Adam([w])
    for gradient in (1.0, NAN, 1.0, 1.0, 1.0):
        w.grad = torch.tensor([gradient])
        adam.step()
    return w

def nan_to_num_on_activations():
    x, w = torch.tensor([[1.0, NAN]]), torch.nn.Parameter(torch.ones(2, 1))
    loss = (torch.nan_to_num(x @ w) - 1).square().sum()
    loss.backward()
    return (w - 0.1 * w.grad).sum() if loss.isfinite() else "seen"              # the loss is finite, for ever

way(1, "a NaN among the targets", "WenjieDu/PyPOTS#232", NAN, "finite",
    naive=lambda: F.mse_loss(torch.zeros(2), torch.tensor([0.0, NAN])), ours=lambda: honest()[0])
way(2, "multiplied by a mask of 0", "ecmwf/WeatherGenerator#2723", NAN, "finite",
    naive=lambda: (torch.tensor([1.0, NAN]) ** 2 * torch.tensor([1.0, 0.0])).sum(), ours=lambda: honest()[0])
way(3, "cells chosen after the loss: the gradient", "pytorch/pytorch#121416", NAN, "finite",
    naive=lambda: slope(lambda p: F.mse_loss(p, torch.tensor([0.0, NAN]), reduction="none")[:1], 0.0, 0.0),
    ours=lambda: honest()[1])
way(4, "the mean of no cells", "pytorch/pytorch#50224", NAN, 0.0,
    naive=lambda: F.mse_loss(torch.zeros(0), torch.zeros(0)), ours=lambda: honest(rate=1e-9)[0])
way(5, "cross-entropy where every target is ignored", "pytorch/pytorch#116349", NAN, 0.0,
    naive=lambda: F.cross_entropy(torch.zeros(3, 5), torch.full((3,), -100)),
    ours=lambda: mean_losses(random_model(), *ask(random_model(), random_batch(), case=(1e-9, 1)))[1])
way(6, "a constant for \"nothing masked\"", "neuro-ml/deep_pipe#75", "error", 0.0,
    naive=lambda: torch.tensor(0.0).backward(), ours=lambda: honest(rate=1e-9)[1])
way(7, "NaN cast to an id", "pytorch/pytorch#154724", -2.0 ** 63, 0.0,
    naive=lambda: torch.tensor([NAN]).long(), ours=lambda: table_of({"c": ["a", None] * 20}).categorical[1])
way(8, "a constant column divided by its spread", "tslearn-team/tslearn#52", NAN, 0.0,
    naive=lambda: ((SAME - SAME.mean()) / SAME.std())[0], ours=lambda: table_of({"x": SAME}).numeric[0])
way(9, "window statistics over no cell", "thuml/Time-Series-Library#356", NAN, 1.0,
    naive=lambda: SAME[SAME < 0].mean(), ours=lambda: model.window_scale(torch.ones(1, 8, 1), ~ALL)[1])
way(10, "a sentinel cast to float32", "scverse/anndata#722", -math.inf, 0.0,
    naive=lambda: torch.tensor(-1.18e42, dtype=torch.float64).float(),
    ours=lambda: table_of({"x": [-1.18e42, *range(30)]}).numeric[0])
way(11, "min(1.0, NaN) for the best loss", "Lightning-AI/pytorch-lightning#2636", 1.0, "stopped",
    naive=lambda: min(1.0, NAN), ours=lambda: "stopped" if poisoned()[0] == 1 else "went on")
way(12, "a softmax in which nothing may be looked at", "pytorch/pytorch#41508", NAN, "finite",
    naive=lambda: (torch.full((3, 3), -math.inf).softmax(-1) @ ONES).sum(),
    ours=lambda: attend(ONES, may_look(NOBODY)).sum())
way(13, "a NaN under a masked key: 0 x NaN", "pytorch/pytorch#101967", NAN, "finite",
    naive=lambda: attend(torch.tensor(HOLES)[None, None, :, None], table_of({"x": HOLES}).observed.T).sum(),
    ours=lambda: attend(table_of({"x": HOLES}).numeric[None, None], table_of({"x": HOLES}).observed.T).sum())
way(14, "finfo.min for -inf: the mean of what is forbidden", "NVIDIA/apex#1390", 2.0, 1.0,
    naive=lambda: (torch.full((3, 3), torch.finfo(torch.float32).min).softmax(-1) @ RAMP)[0, 0, 0],
    ours=lambda: attend(RAMP, may_look(NOBODY) & PAST)[0])  # row 0 sees itself
way(15, "causal, and padding on the left", "pytorch/pytorch#110213", NAN, "finite",
    naive=lambda: attend(ONES, PAST & masking.padding_mask(LEFT)).sum(),
    ours=lambda: attend(ONES, may_look(LEFT) & PAST).sum())
way(16, "attn_mask together with is_causal", "jingyaogong/minimind#382", "error", "finite",
    naive=mask_and_is_causal,
    ours=lambda: create_inputs(next_row_changed(random_batch(), 6), causal=True).attend or 0.0)     # padded
way(17, "heads for rows: does row 5 depend on row 0?", "kyegomez/FlashMHA#1", "no", "yes",
    naive=lambda: "yes" if model.find_leaks(True, model.over_heads)[5, 0] else "no",
    ours=lambda: "yes" if model.find_leaks(True)[5, 0] else "no")
way(18, "where(x > 0, sqrt(x), 0) at 0: the gradient", "pytorch/pytorch#68425", NAN, "finite",
    naive=lambda: slope(lambda x: torch.where(x > 0, x.sqrt(), 0.0), 0.0),
    ours=lambda: slope(lambda x: model.window_scale(x.view(1, 8, 1), ALL)[1], *[1.0] * 8))
way(19, "the root of a squared error of 0: the gradient", "pytorch/pytorch#2421", NAN, 0.0,
    naive=lambda: slope(lambda x: F.mse_loss(x, torch.zeros(1)).sqrt(), 0.0),
    ours=lambda: slope(lambda x: model.sum_losses(model.Prediction(x, UNIT[:1], []), CELL, UNIT[:1]), 0.0))
way(20, "-1e9 for a mask in float16", "NVIDIA/apex#93", -math.inf, "finite",
    naive=lambda: torch.tensor(-1e9).half(), ours=lambda: attend(ONES.half(), may_look(NOBODY)).sum())
way(21, "a small gradient in float16 without a GradScaler", "locuslab/ect#13", 0.0, 1e-8,
    naive=lambda: float16_gradient(False), ours=lambda: float16_gradient(True))
way(22, "LayerNorm of 1e20", "pytorch/pytorch#178123", NAN, "finite",
    naive=lambda: F.layer_norm(torch.tensor([1e20, -1e20, 3e20, 2e20]), (4,)).sum(),
    ours=lambda: F.layer_norm(table_of({"x": [1e20, -1e20, *range(30)]}).numeric[:4, 0], (4,)).sum())
way(23, "full learning rate from step 0", "y0ast/Glow-PyTorch#1", NAN, "finite",
    naive=lambda: descend(careful=False), ours=lambda: descend(careful=True))
way(24, "clipping by a norm of NaN: share of gradients lost", "pytorch/pytorch#46849", 1.0, 0.0,
    naive=clipped_by_nan, ours=lambda: poisoned()[4].isnan().float().mean())
way(25, "Adam after one NaN", "Trusted-AI/adversarial-robustness-toolbox#910", NAN, "finite",
    naive=adam_after_nan, ours=lambda: poisoned()[4].sum())
way(26, "nan_to_num on activations: the weights after a step", "pytorch/pytorch#94700", NAN, "finite",
    naive=nan_to_num_on_activations, ours=lambda: NAN if "nan_to_num" in CODE else honest()[1])
way(27, "one rank stops alone", "Lightning-AI/pytorch-lightning#5243", "the others hang", "all stop",
    naive=lambda: pytest.skip("two processes: test_a_nan_on_one_rank_stops_both"), ours=None)

def show_way(number):  # What naive gives, and what ours gives, as plain numbers or words
    for form in ZOO[number][-2:]:
        try:
            value = form()
        except RuntimeError:
            value = "error"
        yield value.detach().sum().item() if isinstance(value, torch.Tensor) else value

@pytest.mark.parametrize("number", ZOO)
def test_way_to_a_nan(number):
    bad, good = ZOO[number][2:4]
    naive, ours = show_way(number)
    assert naive == bad or naive != naive and bad != bad    # NaN is not even itself
    assert math.isfinite(ours) if good == "finite" else ours == good or abs(ours - good) < 1e-3 * abs(good)

def zoo():  # python test_all.py zoo: the naive form of each way beside ours, and where users met it
    print(f"{'':4}{'way to a NaN':<56}{'naive':>12}{'ours':>12}   met in")
    for number, (what, thread, *_) in ZOO.items():
        try:
            values = "".join(f"{x if isinstance(x, str) else format(x, '.3g'):>12}" for x in show_way(number))
        except pytest.skip.Exception as reason:
            values, thread = f"{'skipped':>24}", f"{thread}; {reason}"
        print(f"{number:>2}  {what:<56}{values}   {thread}")

if __name__ == "__main__":
    if sys.argv[1:] != ["zoo"]:
        sys.exit("python test_all.py zoo, or: python -m pytest test_all.py")
    zoo()
