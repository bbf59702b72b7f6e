"""
Every promise of this repository, executable.

    python test_all.py zoo                          # 27 ways to a NaN, the naive form beside ours
    python -m pytest test_all.py                    # under a minute and a half on two cores
    NANOTAB_SLOW=1 python -m pytest test_all.py     # also what is slow
    ETTH1=ETTh1.csv python -m pytest test_all.py    # also the published protocol on a real table

Where a test guards against a well-known mistake it runs the mistake too, and shows that it fails.
"""
import ast
import contextlib
import csv
import dataclasses
import functools
import gzip
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from pathlib import Path
from types import SimpleNamespace

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
from masking import create_inputs, create_masks, interpolate

NAN = math.nan
UNIT = torch.tensor([1.0, 0.5, 2.0])
ROOT = Path(__file__).parent
slow = pytest.mark.skipif(not os.environ.get("NANOTAB_SLOW"), reason="slow: set NANOTAB_SLOW=1")
etth1 = pytest.mark.skipif(not os.environ.get("ETTH1"), reason="set ETTH1 to the path of ETTh1.csv")
SMALL = ("--n_layer 1 --n_head 2 --n_embd 16 --batch_size 4 --seq_len 16 --max_steps 4 --eval_every 2 "
         "--log_every 1 --warmup_steps 2 --eval_stride 16 --device cpu").split()
AHEAD = "--given 4 --horizons 1 3".split()                  # fits into the 16 rows of SMALL
EIGHT = "--max_steps 8 --dropout 0.1"
LEARN = "--seq_len 32 --n_embd 32 --lr 3e-3"                # enough to learn something in seconds
FACTS = {"script", "data", "steps", "n_params", "seed", "test"}         # in every results.json
PICTURES = ("loss.png", "errors.png", "window.png")
SCRIPTS = {"train_mlm.py": train_mlm, "train_ar.py": train_ar}
OBJECTIVE = train_mlm.objective                             # before any test puts another in its place


# -----------------------------------------------------------------------------
# a toy table, and ways to call things

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


def parsed(parser, *flags):
    return parser.parse_args(words(*flags))


data_args = functools.partial(parsed, data.make_parser(None, "data", "sensors"))
mlm_args = functools.partial(parsed, train_mlm.get_parser(), "--mask_span 6")
ar_args = functools.partial(parsed, train_ar.get_parser())


def table_of(columns, *flags):
    """A Table of a DataFrame or of {name: values}."""
    return load_table(data_args(*flags), pd.DataFrame(columns))


def train(csv, out, *flags, script=train_mlm, pictures=False):
    """A small run; without pictures as on a machine without matplotlib, which is also quicker."""
    with pytest.MonkeyPatch.context() as patch:
        if not pictures:
            patch.setitem(sys.modules, "matplotlib.figure", None)
        small = SMALL + AHEAD * (script is train_ar)
        return script.main([*small, "--data", str(csv), *words(*flags), "--out_dir", str(out)])


def resume(out, *flags, script=train_mlm):
    """Go on with the run in `out`; every flag that is not given here is the checkpoint's."""
    return script.main(["--resume", "--out_dir", str(out), *words(*flags)])


def python(*argv, timeout=None):
    """A process of its own, in the folder of this file."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True,
                          timeout=timeout)


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
    N, real = batch.numeric.shape[-1], batch.valid[..., None]
    observed = batch.observed & real
    return batch._replace(numeric=batch.numeric * observed[..., :N], observed=observed,
                          categorical=batch.categorical * observed[..., N:], clock=batch.clock * real)


def random_batch(B=4, T=12, N=3, K=2, missing=0.2, seed=0):
    """A Batch with ids 2..4 and a few [UNK]."""
    g = torch.Generator().manual_seed(seed)
    observed = torch.rand(B, T, N + K, generator=g) > missing
    ids = torch.randint(1, 5, (B, T, K), generator=g)
    return tidy(Batch(torch.randn(B, T, N, generator=g), ids, observed, torch.ones(B, T).bool(),
                      torch.randn(B, T, 4, generator=g), torch.arange(T).float().repeat(B, 1)))


def random_rows(rows=600, N=3, seed=0):
    """Train rows whose columns and neighbouring rows have to do with each other, (rows, N)."""
    noise = torch.randn(rows, N, generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(pd.DataFrame(noise @ torch.tensor([[1.0, 0.5, 0], [0, 1, 0], [0, 0.3, 1]])[:N, :N])
                            .ewm(alpha=0.3, adjust=False).mean().to_numpy()).float()


def random_model(N=3, K=2, causal=False, closed=False):
    """A small model whose heads are not zero, so that what reaches them reaches the output; closed: its base is
    the closed form."""
    torch.manual_seed(0)
    fit = masking.fit_autoregression if causal else masking.fit_gaussian
    form = fit([random_rows(N=N)], 12) if closed else None
    net = model.TableTransformer(model.Config(N, [5] * K, 4, 12, 2, 2, 16, causal=causal, closed_base=closed), form)
    for head in (net.numeric_head, *net.class_heads):
        torch.nn.init.normal_(head.weight)
    return net


def hide(batch, hidden):
    """The Batch without what is hidden."""
    return batch._replace(observed=batch.observed & ~hidden)


def ask(batch, *flags, case=None, net=SimpleNamespace(base_form=lambda: None)):
    """What train_mlm makes of a batch in its first step, or in a case of evaluation: Inputs and Targets."""
    return train_mlm.make_example(net, batch, mlm_args(*flags), step_generator(1), step=0, case=case)[1:]


def flat(prediction):
    """Numbers and logits side by side: (B, T, N + all classes)."""
    return torch.cat([prediction.numeric, *prediction.logits], dim=-1)


def mean_losses(net, inputs, targets, dtype=torch.float32):
    """The numeric and the categorical loss of a step, (2,), as the loop forms them."""
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


# -----------------------------------------------------------------------------
# data.py

def test_nan_stops_at_the_door(tmp_path):
    path = tmp_path / "hostile.csv"
    odd = ["1.5", "nan", "inf", "-1.18e42", "-inf", "Bad"] * 2 + list(range(48))
    path.write_text("t,a,b,empty,const,word\n" + "".join(
        f"2024-01-01 00:{i:02d}:00,{x},{'' if i % 3 else i},,7,{'x' * (i % 2)}\n" for i, x in enumerate(odd)))
    table = load_table(data_args("--seq_len 8 --data", path))
    batch, N = table.batch(table.starts("train", 1)), len(table.schema.numeric)
    for name, tensor in batch._asdict().items():
        assert torch.isfinite(tensor.float()).all(), name
    assert (batch.numeric[~batch.observed[..., :N]] == 0).all()
    assert (batch.categorical[~batch.observed[..., N:]] == 0).all()
    # two each of inf, -inf, -1.18e42 and a word among numbers; nan was missing
    assert table.stats["a"].repaired == 8
    assert table.schema.scale[table.schema.numeric.index("const")] == 1.0       # naive: 8 and 10 of the zoo


def test_schema_sees_train_rows_only():
    changed = toy()
    changed.loc[280:, ["wave", "mirror", "sign"]] = 1e6, 1e6, "sideways"
    a, b = (table_of(frame, "--split 0.7 0.15 0.15") for frame in (toy(), changed))
    assert a.schema == b.schema
    everything = [data.fit_scale(frame["wave"].to_numpy(), "standard") for frame in (toy(), changed)]
    assert everything[0] != everything[1]                   # naive: statistics over all rows see the change
    assert (b.categorical[280:] == data.UNK_ID).sum() == 120 and not (a.categorical == data.UNK_ID).any()
    assert b.numeric.abs().max() > 1e5                                          # kept as it is, not clipped


def test_a_schema_serves_another_file(tmp_path, capsys):
    table = table_of(toy(), "--seq_len 16")
    torch.save(dataclasses.asdict(table.schema), tmp_path / "schema.pt")
    schema = data.Schema(**torch.load(tmp_path / "schema.pt", weights_only=True))
    assert schema == table.schema
    other = toy(seed=1).assign(wave=lambda frame: frame["wave"] * 5 + 20)
    theirs = load_table(data_args("--seq_len 16"), other, schema=schema)
    ours = theirs.numeric[:, 0] * schema.scale[0] + schema.center[0]
    here = theirs.observed[:, 0].numpy()
    np.testing.assert_allclose(ours[here], other["wave"][here], rtol=1e-4)      # by the old scales
    refused(lambda: load_table(data_args(), other.drop(columns="mirror"), schema=schema), capsys, "mirror")


@pytest.mark.parametrize("day,thousand,flags", [
    ("%d.%m.%Y", "", "--sep ';' --decimal ,"), ("%Y-%m-%d", "1.0", "--sep ';' --decimal , --thousands ."),
    ("%d.%m.%Y", "1.0", "--sep ';' --decimal , --thousands .")])
def test_a_file_with_decimal_commas_and_a_word(day, thousand, flags, tmp_path):
    path, days = tmp_path / "comma.csv", pd.date_range("2024-03-01", periods=30).strftime(day)
    values = ["Ausfall" if i == 3 else f"{thousand}{i + 10},5" for i in range(30)]
    path.write_text("Datum;Last\n" + "".join(f"{d};{x}\n" for d, x in zip(days, values)))
    table = load_table(data_args("--seq_len 4 --data", path, flags))
    assert table.kinds == {"Datum": "time", "Last": "numeric"}
    assert table.stats["Last"].repaired == 1 and table.stats["Last"].max == (1039.5 if thousand else 39.5)
    assert table.axis.stamps.iloc[-1] == pd.Timestamp("2024-03-30")


def test_numbers_that_name_categories_keep_their_labels():
    codes = pd.DataFrame({"code": [1.0, 2.0] * 50, "x": 0.5})
    codes.loc[[97, 98], "code"] = 2.5, np.nan               # in the test rows: must not turn 1 into 1.0
    table = table_of(codes, "--categorical_cols code --seq_len 8")
    assert table.schema.vocabulary == [["1.0", "2.0"]] and (table.categorical == data.UNK_ID).sum() == 1


@pytest.mark.parametrize("scaler", ["standard", "robust", "none"])
def test_scalers(scaler):
    x = np.concatenate([np.random.default_rng(0).normal(5, 2, 10_000), [1e9], [np.nan]])
    center, scale = data.fit_scale(x, scaler)
    expected = {"standard": (5, 2), "robust": (5, 2.698), "none": (5, 1)}[scaler]
    assert center == pytest.approx(expected[0], rel=0.02) and scale == pytest.approx(expected[1], rel=0.02)
    assert data.fit_scale(np.array([np.nan]), scaler) == (0.0, 1.0)


def test_windows_stay_in_their_group_and_pad_on_the_right():
    lengths = [30, 5, 12, 40, 7, 9, 22, 3, 16, 50]
    well = np.repeat(np.arange(10), lengths)
    frame = pd.DataFrame({"well": well, "x": np.arange(len(well), dtype=float), "y": well * 1.0})
    table = table_of(frame, "--group_col well --seq_len 20 --scaler none")
    rows = {split: set() for split in ("train", "val", "test")}
    for split in rows:
        for windows in (table.starts(split, 7), table.sample(split, 200, step_generator(1))):
            batch = table.batch(windows)
            own = (batch.numeric + torch.tensor(table.schema.center) * batch.observed).round()  # own units
            for numeric, observed, real, time in zip(own, batch.observed, batch.valid, batch.time):
                assert numeric[real, 1].unique().numel() == 1                   # one group
                assert (numeric[real, 0].diff() == 1).all()                     # rows in order, none skipped
                assert real.sum() == min(20, lengths[int(numeric[0, 1])]) and real[:real.sum()].all()
                assert not observed[~real].any() and (numeric[~real] == 0).all()
                assert time[0] == 0 and (time[real].diff() == 1).all() and (time.diff() >= 0).all()
                rows[split] |= set(numeric[real, 0].tolist())
    assert sum(map(len, rows.values())) == sum(lengths) == len(set.union(*rows.values()))


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
    clock = table.clock                                     # of 25 days: day and week are cycles, the year not yet
    assert clock.shape == (600, 4)
    day = clock[:, [0, 2]]
    torch.testing.assert_close(day[:24], day[24:48], atol=1e-5, rtol=0)
    quarters = torch.tensor([[0.0, 1], [1, 0], [0, -1], [-1, 0]])
    torch.testing.assert_close(day[[0, 6, 12, 18]], quarters, atol=1e-5, rtol=0)
    long = {"date": pd.date_range("2020-01-01", periods=1500, freq="D"), "x": np.arange(1500.0)}
    assert table_of(long).clock.shape == (1500, 6)


@pytest.mark.parametrize("column,kind", [
    (["a", "b", None], "categorical"), ([True, False, None], "categorical"), ([True, False], "categorical"),
    ([1, 2, 3], "numeric"), ([None, None, None], "numeric"), (["1.5", "2", None], "numeric"),
    (["2024-01-01", "2024-01-02", None], "time"), (["01.03.2024 10:00", "31.03.2024 10:00"], "time"),
    (["2024-03-31 01:00+01:00", "2024-03-31 04:00+02:00"], "time"), (["a1", "b2", "c3"], "categorical"),
    (["may", "june"], "categorical"), (["M3", "1h"], "categorical")])
def test_kinds_are_inferred(column, kind):
    frame = pd.DataFrame({"x": pd.Series(column), "n": 1.0})
    assert data.infer_kinds(frame, data_args())["x"] == kind


def test_simulated_sensors_are_as_described():
    table = data.simulate_sensors(8000)
    pd.testing.assert_frame_equal(table, data.simulate_sensors(8000))
    assert table["humidity"].isna().all() and table["line_frequency"].nunique() == 1
    assert table["flow"].min() < -1e41 and table["time"].diff().dropna().dt.total_seconds().eq(1).all()
    assert table["mode"].eq("maintenance").idxmax() > 0.9 * len(table)          # first seen in the test rows
    flow = table.groupby("mode")["flow"].median()
    assert flow["boost"] > 2 * flow["idle"]


def test_simulated_planets_are_as_described():
    table = data.simulate_planets(300)
    pd.testing.assert_frame_equal(table, data.simulate_planets(300))
    lengths = table.groupby("idx").size()
    assert len(lengths) == 300 and lengths.min() == 30 and lengths.max() == 59
    assert (table["time_step"] == table.groupby("idx").cumcount()).all()
    count = table["n_planets"].str[0].astype(int)
    for i in range(5):
        for c in "xymae":
            assert (table[f"planet{i}_{c}"].isna() == (count <= i)).all()
        # Kepler's ellipse: the distance lies between a (1 - e) and a (1 + e)
        distance = np.hypot(table[f"planet{i}_x"], table[f"planet{i}_y"])
        a, e = table[f"planet{i}_a"], table[f"planet{i}_e"] / 20
        assert ((distance < a * (1 + e) * 1.001) & (distance > a * (1 - e) * 0.999) | distance.isna()).all()
    x = table.filter(regex="planet._x").sum(axis=1)
    assert (table["acceleration_x"] == np.where(x > 0, "increasing", "decreasing")).all()
    assert table["total_mass"].values == pytest.approx(table.filter(regex="planet._m").sum(axis=1).values)
    assert table_of(table, "--data planets").segments["train"].shape == (210, 2)


# -----------------------------------------------------------------------------
# masking.py: what is hidden

@pytest.mark.parametrize("span", [1, 4, 12])
@pytest.mark.parametrize("rate", [0.05, 0.25, 0.5, 0.9])
def test_rate_and_runs_of_hidden_cells(span, rate):
    hidden = create_masks(torch.ones(256, 200, 10).bool(), rate, step_generator(1), span)
    assert hidden.float().mean() == pytest.approx(rate, abs=0.012)
    assert hidden[:, 0].float().mean() == pytest.approx(rate, abs=0.06)         # the first row like any other
    runs = (hidden[:, 1:] & ~hidden[:, :-1]).sum() + hidden[:, 0].sum()
    mean = max(span, 1 / (1 - rate))
    expected = 200 / (1 + 199 / mean)                       # the window cuts some runs short
    assert hidden.sum() / runs == pytest.approx(expected, rel=0.1)


def test_runs_of_one_row_are_independent_cells():
    hidden = create_masks(torch.ones(64, 500, 10).bool(), 0.3, step_generator(1)).float()
    after_hidden = hidden[:, 1:][hidden[:, :-1] == 1].mean()
    after_shown = hidden[:, 1:][hidden[:, :-1] == 0].mean()
    assert after_hidden == pytest.approx(0.3, abs=0.01) and after_shown == pytest.approx(0.3, abs=0.01)
    runs = create_masks(torch.ones(64, 500, 10).bool(), 0.3, step_generator(1), span=6).float()
    assert runs[:, 1:][runs[:, :-1] == 1].mean() > 0.8      # what the test would see if they were not


def test_missing_cells_are_never_hidden_the_naive_form_hides_them():
    x = torch.tensor([[1.0, float("nan"), 3.0]])
    assert ((torch.rand(x.shape) < 1) & (x != 0)).all()                         # naive: NaN != pad is True
    batch = random_batch()
    for span in (1, 12):
        hidden = create_masks(masking.scorable(batch), 0.9, step_generator(0), span)
        assert not (hidden & ~batch.observed).any() and not hidden[..., 3:][batch.categorical == 1].any()


def test_one_rate_and_one_span_a_window():
    rates, spans = torch.tensor([0.1, 0.6])[:, None, None], torch.tensor([1.0, 9.0])[:, None, None]
    hidden = create_masks(torch.ones(2, 4000, 5).bool(), rates, step_generator(0), spans)
    torch.testing.assert_close(hidden.float().mean((1, 2)), rates[:, 0, 0], atol=0.03, rtol=0)
    runs = (hidden[:, 1:] & ~hidden[:, :-1]).sum((1, 2))
    torch.testing.assert_close(hidden.sum((1, 2)) / runs, torch.tensor([1 / 0.9, 9.0]), atol=0, rtol=0.1)


def test_80_10_10_and_the_two_draws_that_miss_it():
    batch = random_batch(64, 400, missing=0.1)
    batch = batch._replace(numeric=torch.arange(64 * 400 * 3).view(64, 400, 3).float())         # all different
    hidden = create_masks(masking.scorable(batch), 0.5, step_generator(0))
    shown = masking.bert_style_masking(batch, hidden, step_generator(1))
    masked = hidden & ~shown.observed
    same = shown.numeric == batch.numeric
    for kind in (slice(3), slice(3, None)):
        assert masked[..., kind].sum() / hidden[..., kind].sum() == pytest.approx(0.8, abs=0.012)
    for share in (~same, same & (hidden & shown.observed)[..., :3]):            # another value, or its own
        assert share.sum() / hidden[..., :3].sum() == pytest.approx(0.1, abs=0.012)
    assert same[~hidden[..., :3]].all() and same[masked[..., :3]].all()         # nothing else is touched
    assert torch.equal(shown.observed[~hidden], batch.observed[~hidden])
    # naive: 80 % masked, and half of ALL cells that a second draw picks from the rest and its leftovers
    g = torch.Generator().manual_seed(0)
    first, second = torch.rand(10**6, generator=g), torch.rand(10**6, generator=g)
    naive_random = (first >= 0.8) & (second < 0.1)                              # meant as 10 % of all, is 2 %
    assert abs(naive_random.float().mean() - 0.1) > 0.05


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
    nobody = masking.bert_style_masking(batch, batch.observed, step_generator(1), 0.0, 1.0)
    assert not nobody.observed.any()                                            # no donors: all unknown


def test_mixed_windows_hold_known_numbers_alone_and_what_columns_share():
    batch = random_batch(B=6, N=2, K=1)
    line = batch.numeric[..., :1]                                               # column 1 = 3 - 2 * column 0
    observed = batch.observed[..., [0, 0, 2]]
    batch = batch._replace(numeric=torch.cat([line, 3 - 2 * line], -1) * observed[..., :2], observed=observed)
    mixed = masking.mix_up(batch, 0.5, step_generator(0))
    both = observed[..., :2] & observed[..., :2].roll(1, 0)
    assert torch.equal(mixed.observed, torch.cat([both, observed[..., 2:]], dim=-1))
    assert (mixed.numeric[~both] == 0).all() and torch.equal(mixed.categorical, batch.categorical)
    x, y = mixed.numeric[both].view(-1, 2).T                                    # holds in the mixture as well
    assert torch.allclose(y, 3 - 2 * x, atol=1e-5) and (x - line.squeeze(-1)[both[..., 0]]).abs().max() > 0.1


def test_schedule_hits_both_ends():
    p = masking.get_mask_probability
    for end, steps in ((0.05, [(0, 60), (-5, 60), (0, 0), (0, 1)]), (0.25, [(59, 60), (1000, 60), (1, 1)])):
        assert [p(*step, 0.05, 0.25) for step in steps] == [end] * len(steps)
    rates = [p(s, 60, 0.05, 0.25) for s in range(60)]
    assert np.allclose(np.diff(rates), 0.2 / 59)
    assert 0.05 + 0.2 * 59 / 60 < 0.25  # naive epoch / total never arrives


# -----------------------------------------------------------------------------
# masking.py: what the model starts from, who may look

def test_the_base_is_what_pandas_would_write():
    g = torch.Generator().manual_seed(0)
    numeric, known = torch.randn(6, 40, 5, generator=g), torch.rand(6, 40, 5, generator=g) < 0.3
    known[0, :, 0] = False                                  # nothing to go by: 0
    time = torch.rand(6, 40, generator=g).cumsum(1)         # uneven steps
    both, causal = interpolate(numeric, known, time), masking.last_known(numeric, known)
    for b in range(6):
        frame = pd.DataFrame(numeric[b].double().numpy()).where(known[b].numpy())
        line = frame.set_axis(time[b].double().numpy()).interpolate("index", limit_direction="both").fillna(0)
        np.testing.assert_allclose(both[b], line, atol=1e-5)
        np.testing.assert_array_equal(causal[b], frame.ffill().fillna(0))
    assert torch.equal(both[known], numeric[known])
    by_row = interpolate(numeric, known, torch.arange(40.0).expand(6, 40))      # naive: by row number
    assert (by_row - both).abs().max() > 0.1
    ids, rows = torch.tensor([2, 0, 0, 0, 3, 0, 0])[None, :, None], torch.arange(7.0)[None]
    for time, expected in ((rows, [2, 2, 2, 3, 3, 3, 3]), (rows ** 2, [2, 2, 2, 3, 3, 3, 3]),
                           (rows.sqrt(), [2, 2, 3, 3, 3, 3, 3])):               # of two as near the earlier
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
    for b in range(len(known)):
        k, u = known[b].flatten(), ~known[b].flatten()
        weights = torch.linalg.solve(S[k][:, k], S[k][:, u])                                    # (known, unknown)
        torch.testing.assert_close(base[b].flatten()[u].double(), weights.T @ numeric[b].flatten()[k].double(),
                                   atol=1e-3, rtol=1e-3)
        left = (S[u][:, u] - S[u][:, k] @ weights).diagonal().sqrt()
        torch.testing.assert_close(deviation[b].flatten()[u].double(), left, atol=1e-3, rtol=1e-3)


def test_autoregression_equals_a_dense_solve():
    T, N, rows = 12, 3, random_rows()
    regression = masking.fit_autoregression([rows[:400], rows[400:]], T)        # no step from one to the other
    steps = [x.diff(dim=0) for x in (rows[:400], rows[400:])]
    unit = torch.cat(steps).square().mean(0).sqrt()
    S = masking.lag_covariance([x / unit for x in steps], T, own=0.03, level=0.0)
    window = rows[100:100 + T][None]
    said = masking.autoregress(window, regression)[0]
    for t in (0, 1, 5, T - 1):
        before = (window[0].diff(dim=0)[:t] / unit).flatten().double()          # the t steps up to row t
        next_step = S[t * N:(t + 1) * N, :t * N] @ torch.linalg.solve(S[:t * N, :t * N], before) * unit.double()
        torch.testing.assert_close(said[t].double(), window[0, t].double() + next_step, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(masking.autoregress(window + 1e3, regression)[0], said + 1e3, atol=1e-2, rtol=0)
    short = masking.autoregress(window[:, :5], regression)[0]
    torch.testing.assert_close(short, said[:5])             # a window may be shorter


def test_out_of_reach_and_in_dead_columns_the_line_stays():
    rows = torch.cat([random_rows(), torch.full((600, 1), 2.0)], dim=1)         # and a constant
    precision = masking.fit_gaussian([rows], 12)
    batch = random_batch(N=4, K=0, missing=0.4)
    for level in (0.0, 50.0):
        numeric = (batch.numeric + level) * batch.observed
        line = interpolate(numeric, batch.observed, batch.time)
        base, deviation = masking.gaussian_fill(line, batch.observed, precision)
        still = torch.ones_like(line).bool() if level else torch.arange(4).expand_as(line) == 3
        assert torch.equal(base[still], line[still]) and (deviation[still] == 0).all()
        assert torch.equal(base[~still & ~batch.observed], line[~still & ~batch.observed]) == bool(level)
    assert torch.isfinite(base).all()


def test_no_query_is_ever_empty_the_naive_mask_makes_nan():
    valid = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    q, k, v = torch.randn(3, 3, 2, 4, 8).unbind(0)
    for causal in (False, True):
        attend = masking.create_attention_mask(valid, causal)
        assert attend.shape == (3, 1, 4, 4) and attend.any(-1).all()
        assert not attend[1, 0, :2, 2:].any()  # padding is looked at by nobody real
        assert torch.isfinite(model.plain_attention(q, k, v, attend)).all()
        assert not (causal and attend[0, 0].triu(1).any())
    naive = valid[:, None, :, None] & valid[:, None, None, :]  # whole padded query rows masked
    assert model.plain_attention(q, k, v, naive).isnan().any()


# -----------------------------------------------------------------------------
# model.py

@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_equals_plain_softmax(dtype, tolerance, causal, padded):
    torch.manual_seed(0)
    valid = torch.arange(20) < torch.tensor([20, 7 if padded else 20])[:, None]
    full = masking.create_attention_mask(valid, causal)
    # causal, the model is given no mask: padding on the right is in the future of every real row
    attend = None if causal or not padded else full
    block = model.SelfAttention(model.Config(1, [], n_head=4, n_embd=32, causal=causal)).to(dtype)
    x, rotary = torch.randn(2, 20, 32, dtype=dtype), rotary_of(8, 20)
    out = block(x, attend, rotary)
    q, k, v = block.qkv(x).view(2, 20, 3, 4, 8).float().permute(2, 0, 3, 1, 4)
    y = model.plain_attention(model.apply_rotary(q, rotary), model.apply_rotary(k, rotary), v, full)
    y = block.proj(y.transpose(1, 2).reshape(2, 20, 32).to(dtype))
    torch.testing.assert_close(out[valid], y[valid], atol=tolerance, rtol=tolerance)


def rotary_of(hs, T):
    return model.TableTransformer(model.Config(1, [], seq_len=T, n_layer=0, n_head=1, n_embd=hs)).rotary


def test_rotary_attention_depends_on_distance_alone():
    rotary, (q, k) = rotary_of(8, 30), torch.randn(2, 8).unbind(0)
    turn = lambda x, row: model.apply_rotary(x.view(1, 1, 1, 8), rotary[row]).flatten()
    for row in (5, 20):
        assert torch.allclose(turn(q, 3) @ turn(k, 0), turn(q, row + 3) @ turn(k, row), atol=1e-5)
    assert not torch.allclose(turn(q, 3) @ turn(k, 0), turn(q, 4) @ turn(k, 0), atol=1e-5)


def test_who_sees_whom():
    assert model.find_leaks(causal=False).all()             # masked: past and future
    causal = model.find_leaks(causal=True)                  # naive, over heads: way 17 of the zoo
    assert torch.equal(causal, torch.ones(12, 12).tril().bool())
    inputs, _ = ask(random_batch(missing=0), case=(0.5, 1))                     # and other columns
    numeric = inputs.numeric.clone().requires_grad_()
    said = random_model()(inputs._replace(numeric=numeric)).numeric[0, 4, 0]
    gradient, = torch.autograd.grad(said, numeric)
    assert (gradient[0, inputs.known[0, :, 1], 1] != 0).all()


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("flags", ["", "--mask_share 0.8 --random_share 0.1", "--mask_span 12"])
def test_inputs_hold_nothing_that_is_hidden(flags, closed):
    batch, net = random_batch(), random_model(closed=closed)
    inputs, targets = ask(batch, flags, net=net)
    covered = targets.score & ~inputs.known                                     # shown as [MASK]
    assert covered[..., :3].any() and covered[..., 3:].any()
    assert (targets.score & inputs.known).any() == ("share" in flags)           # random and kept cells
    forged = batch._replace(numeric=torch.where(covered[..., :3], 9.0, batch.numeric),
                            categorical=torch.where(covered[..., 3:], 4, batch.categorical))
    other, asked = ask(forged, flags, net=net)
    assert not torch.equal(asked.numeric, targets.numeric)                      # it is asked for other things,
    for ours, theirs in zip(inputs, other):                                     # and sees the same
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert torch.equal(flat(net(inputs)), flat(net(other)))
    naive = torch.where(inputs.known[..., :3], 0.0, forged.numeric - batch.numeric)     # naive: the batch itself
    assert naive.abs().max() > 1


@pytest.mark.parametrize("causal", [False, True])
def test_an_untrained_model_is_its_base(causal):
    batch = random_batch(T=30)
    net = model.TableTransformer(model.Config(3, [5, 5], 4, 30, 1, 2, 16, causal=causal))
    inputs = create_inputs(hide(batch, create_masks(batch.observed, 0.3, step_generator(0))), causal)
    prediction = net(inputs)
    assert torch.equal(prediction.numeric, inputs.base)
    # nothing to guess from, or [UNK]: the most frequent value
    assert torch.equal(prediction.ids(), inputs.base_ids.clamp(min=2))


def test_levels_far_away_are_clipped_for_the_network_and_not_for_the_base():
    batch, net = random_batch(T=12), random_model()
    far = batch._replace(numeric=(batch.numeric + 1e4) * batch.observed[..., :3])
    hidden = create_masks(batch.observed, 0.3, step_generator(0))
    near, level = (net(create_inputs(hide(b, hidden), causal=False)).numeric for b in (batch, far))
    known = hide(batch, hidden).observed[..., :3].any(1, keepdim=True).expand_as(near)
    torch.testing.assert_close(level[known], near[known] + 1e4, atol=0.02, rtol=0)      # the level moves along
    seen = []
    net.embed.register_forward_hook(lambda _, given, __: seen.append(given[0].abs().max()))
    spike = batch._replace(numeric=torch.where(hidden[..., :3], batch.numeric, batch.numeric * 1e8))
    assert torch.isfinite(flat(net(create_inputs(spike, causal=True)))).all() and max(seen) <= net.config.clip
    _, targets = ask(far)
    assert not targets.score[..., :3].any()                 # beyond the clip nothing is asked for


def outputs(net, batch, **changed):
    """What is said of the next rows of a batch."""
    _, inputs, _ = train_ar.make_example(net, batch, ar_args(), step_generator(0))
    return flat(net(inputs._replace(**changed)))


def next_row_changed(batch, t):
    """The batch with everything another from row t on: numbers, ids, holes, clock, and where it ends."""
    other = random_batch(seed=9, missing=0.5)
    other.valid[:, t + 3:] = False
    return Batch(*(torch.cat([a[:, :t], b[:, t:]], dim=1) for a, b in zip(batch, tidy(other))))


@pytest.mark.parametrize("closed", [False, True])
def test_causal_outputs_never_depend_on_what_comes_after(closed):
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
    net.config.causal = False                               # naive: the level and spread of the whole window
    assert not torch.equal(outputs(net, batch)[:, :6], outputs(net, next_row_changed(batch, 6))[:, :6])


def test_causal_outputs_depend_on_what_came_before():
    batch, net = random_batch(missing=0), random_model(causal=True)
    for t in range(1, 12):
        for field, value in (("numeric", 3.0), ("categorical", 3), ("clock", 3.0), ("observed", 0)):
            changed = getattr(batch, field).clone()
            changed[:, t - 1] = torch.where(changed[:, t - 1] == value, 2, value)
            later = outputs(net, batch._replace(**{field: changed}))[:, t:]
            assert (later != outputs(net, batch)[:, t:]).any(-1).all(), (t, field)


def test_the_target_is_the_next_row_and_missing_targets_are_not_scored():
    batch = random_batch(missing=0.3)
    shown, targets = train_ar.objective(batch, ar_args(), None, case="next row")
    assert torch.equal(targets.numeric[:, :-1], batch.numeric[:, 1:])
    assert torch.equal(targets.categorical[:, :-1], batch.categorical[:, 1:])
    assert torch.equal(targets.score[:, :-1], masking.scorable(batch)[:, 1:])
    assert not targets.score[:, -1].any() and torch.equal(shown.observed, batch.observed)


def test_rollout_equals_a_loop_written_out():
    """Rows one at a time, the last 12 looked at; a column without any value has no future either."""
    batch, net, steps = random_batch(B=3, T=10, missing=0.3), random_model(causal=True), 7
    batch.observed[2, :, 1] = False
    batch, clock = tidy(batch), torch.randn(3, steps, 4)
    together = net.rollout(batch, clock)
    for b in range(3):
        history = Batch(*(x[b:b + 1] for x in batch))
        ever = history.observed.any(1)[0]
        for s in range(steps):
            with torch.no_grad():
                prediction = net(create_inputs(Batch(*(x[:, -12:] for x in history)), causal=True))
            row = Batch(prediction.numeric[:, -1:] * ever[:3], prediction.ids()[:, -1:] * ever[3:],
                        ever.expand(1, 1, 5), torch.ones(1, 1).bool(), clock[b:b + 1, s:s + 1],
                        history.time[:, -1:] + 1)
            history = Batch(*(torch.cat(pair, dim=1) for pair in zip(history, row)))
        for ours, theirs in zip(together, history):
            torch.testing.assert_close(ours[b:b + 1], theirs[:, -steps:], atol=1e-5, rtol=1e-5)
    assert together.observed[0].any() and not together.observed[2, :, 1].any()


def test_baselines_roll_out_to_what_they_are():
    """Repetition stays, a line goes on, and a season repeats itself, when each goes on from its own words."""
    t = torch.arange(12.0)
    numeric = torch.stack([t, t * 0.5 - 1, torch.sin(t * torch.pi / 3)], dim=-1)[None]      # a period of 6
    batch = random_batch(B=1, missing=0)._replace(numeric=numeric)
    net, args = random_model(causal=True), ar_args("--season", "6")
    def ahead(name):
        clock = torch.zeros(1, 9, 4)
        return net.rollout(batch, clock, lambda shown: train_ar.baselines(shown, args)[name]).numeric[0]
    t = torch.arange(12.0, 21.0)
    assert torch.equal(ahead("last"), numeric[0, -1].expand(9, 3))
    torch.testing.assert_close(ahead("linear")[:, :2], torch.stack([t, t * 0.5 - 1], -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(ahead("season")[:, 2], torch.sin(t * torch.pi / 3), atol=1e-5, rtol=0)


def test_padding_changes_nothing():
    padded, net = random_batch(B=1), random_model()
    hidden = create_masks(padded.observed, 0.3, step_generator(0))
    padded.valid[:, 8:] = False
    a, b = (flat(net(create_inputs(hide(batch, hidden[:, :rows]), causal=False)))
            for rows, batch in ((8, padded.rows(0, 8)), (12, tidy(padded))))
    torch.testing.assert_close(a, b[:, :8], atol=1e-5, rtol=1e-5)


def test_window_scale_stays_finite_and_calm():
    known = torch.tensor([True, False, True]).expand(1, 50, 3)
    center, scale = model.window_scale(torch.full((1, 50, 3), 3.0), known)
    # no known cell: the train column's own
    assert center.flatten().tolist() == [3, 0, 3] and scale[0, 0, 1] == 1
    assert (scale > 0.1).all()  # no spread: not divided by nothing


def test_unk_is_a_constant_zero():
    embed, ids, known = random_model().embed, torch.ones(1, 12, 2).long(), torch.ones(1, 12, 5).bool()
    zero = embed(torch.zeros(1, 12, 3), torch.zeros(1, 12, 3), ids, known, torch.zeros(1, 12, 4))
    assert torch.equal(zero, embed.numbers.bias.expand(1, 12, 16))
    zero.sum().backward()
    assert all(embedding.weight.grad[1].abs().sum() == 0 for embedding in embed.categories)


HOSTILE = {
    "as it is": lambda b: None,
    "missing column": lambda b: b.observed[..., 0].fill_(False),
    "missing row": lambda b: b.observed[:, 3].fill_(False),
    "empty window": lambda b: b.observed[0].fill_(False),
    "nothing observed": lambda b: b.observed.fill_(False),
    "constant columns": lambda b: b.numeric.fill_(2.0),
    "one category": lambda b: b.categorical.fill_(2),
    "a spike": lambda b: b.numeric[:, 5].fill_(1e9),
    "padding": lambda b: b.valid[:, 5:].fill_(False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2), (3, 0), (0, 2)])
@pytest.mark.parametrize("how", HOSTILE)
def test_loss_and_gradients_are_finite(how, shape, dtype):
    N, K = shape
    batch = random_batch(N=N, K=K)
    HOSTILE[how](batch)
    for rate in (1e-9, 0.5, 0.999):                         # next to none hidden: the mean of no cells is 0/0
        net = random_model(N, K)
        loss = mean_losses(net, *ask(tidy(batch), case=(rate, 1)), dtype).sum()
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


def test_bfloat16_stays_near_float32():
    asked, found = ask(random_batch(B=16), case=(0.3, 1)), []
    for dtype in (torch.float32, torch.bfloat16):           # 8 bits of mantissa: steps of 0.4 %
        net = random_model()
        loss = mean_losses(net, *asked, dtype).sum()
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in net.parameters()])))
    (exact, gradient), (rough, other) = found
    assert rough == pytest.approx(exact, rel=0.02) and rough != exact
    assert (other - gradient).norm() < 0.05 * gradient.norm()


def test_loss_is_the_mean_over_scored_cells():
    net, (inputs, targets) = random_model(), ask(random_batch(), "--mask_share 0.8 --random_share 0.1")
    prediction, chosen = net(inputs), targets.score[..., :3]
    ours, truth = (prediction.numeric / UNIT)[chosen], (targets.numeric / UNIT)[chosen]
    entropies = [F.cross_entropy(logits[here], ids[here] - 2, reduction="none") for logits, ids, here in
                 zip(prediction.logits, targets.categorical.unbind(-1), targets.score[..., 3:].unbind(-1))]
    expected = torch.stack([F.mse_loss(ours, truth), torch.cat(entropies).mean()])
    torch.testing.assert_close(mean_losses(net, inputs, targets), expected)
    huber = model.sum_losses(prediction, targets, UNIT, "huber")[0]
    torch.testing.assert_close(huber, F.huber_loss(ours, truth, reduction="sum"))
    with pytest.raises(KeyError):
        model.sum_losses(prediction, targets, UNIT, "hubr")         # no silent fallback


# -----------------------------------------------------------------------------
# the loop

def test_loss_falls_and_beats_the_baselines(toy_csv, tmp_path):
    history = train(toy_csv, tmp_path, LEARN, "--n_layer 2 --batch_size 32 --max_steps 300 --eval_every 100",
                    "--mask_span 4 --base linear", pictures=True)
    assert history[-1]["val"] < 0.5 * history[0]["val"]
    found = results(tmp_path)
    assert FACTS | {"eval_mask_probs"} <= set(found) and set(found["test"]) == {"cell", "span"}
    for means in found["test"].values():
        errors = {name: np.array(mean["mse"]) for name, mean in means.items()}
        assert set(errors) == {"model", "mean", "last", "linear", "gauss"} and len(errors["model"]) == 4
        ours = errors.pop("model")
        for name in ("mean", "last", "linear"):
            assert (ours < 0.8 * errors[name]).all(), name                      # at every rate
    cell, span = (found["test"][kind]["linear"]["mse"][1] for kind in ("cell", "span"))
    assert span > 1.2 * cell                                # a line over four rows of this wave is worse
    assert len(pd.read_csv(tmp_path / "log.csv")) == len(history)
    assert all((tmp_path / name).stat().st_size > 5000 for name in PICTURES)


def test_same_seed_same_bits_and_evaluation_changes_nothing(finished, toy_csv, tmp_path):
    train(toy_csv, tmp_path, EIGHT, "--eval_every 1 --eval_stride 3")
    assert same_bits(finished, tmp_path)
    train(toy_csv, tmp_path, EIGHT, "--seed 1")
    assert not same_bits(finished, tmp_path)


def test_resume_ends_with_the_same_bits(finished, toy_csv, tmp_path, monkeypatch):
    real = train_mlm.get_lr
    def stop_at_five(step, args):
        assert step < 5, "stop"
        return real(step, args)
    monkeypatch.setattr(train_mlm, "get_lr", stop_at_five)
    with pytest.raises(AssertionError, match="stop"):
        train(toy_csv, tmp_path, EIGHT)
    assert len(pd.read_csv(tmp_path / "log.csv")) == 4      # written with last.pt, so the two always agree
    monkeypatch.undo()
    history = resume(tmp_path)
    assert same_bits(finished, tmp_path)
    assert [row["step"] for row in history] == list(range(1, 9))
    assert pd.read_csv(tmp_path / "log.csv")["step"].tolist() == list(range(1, 9))
    whole = saved(finished)["history"]
    assert [row["train"] for row in history] == pytest.approx([row["train"] for row in whole])
    resume(tmp_path, "--max_steps 9 --weight_decay 0.5")
    assert saved(tmp_path)["step"] == 9 and saved(tmp_path)["args"]["dropout"] == 0.1
    assert saved(tmp_path)["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_a_non_finite_gradient_stops_before_the_step_and_says_why(finished, toy_csv, tmp_path, monkeypatch,
                                                                  capsys):
    models, seen = [], []
    def poisoned(batch, args, generator, step=None, case=None):
        shown, targets = OBJECTIVE(batch, args, generator, step, case)
        if step == 3:                                       # a NaN in `mirror` that has slipped past the door
            b, t = shown.observed[..., 1].nonzero()[0].tolist()
            seen.append(batch.numeric[b, t, 1].item())
            shown.numeric[b, t, 1] = NAN
        return shown, targets
    def keep(*made_of):
        models.append(model.TableTransformer(*made_of))
        return models[0]
    monkeypatch.setattr(train_mlm, "objective", poisoned)
    monkeypatch.setattr(train_mlm, "TableTransformer", keep)
    with pytest.raises(SystemExit) as stopped:
        train(toy_csv, tmp_path, EIGHT)
    message = capsys.readouterr().err
    for said in ("step 3", "mirror: up to inf", "embed.numbers.weight", "--resume"):
        assert said in message
    row = int(re.search(r"mirror: .* in row (\d+)", message)[1])
    assert load_table(data_args("--data", toy_csv)).numeric[row, 1] == seen[0]  # that very cell
    for x in (*models[0].parameters(), *saved(tmp_path)["model"].values()):     # in memory and on disk
        assert torch.isfinite(x).all()
    assert stopped.value.code == 1 and saved(tmp_path)["step"] == 3             # nothing of it is lost
    monkeypatch.undo()
    resume(tmp_path)
    assert same_bits(finished, tmp_path)


def test_ctrl_c_says_how_to_go_on_from_the_last_save(finished, toy_csv, tmp_path):
    run = subprocess.Popen([sys.executable, "train_mlm.py", *SMALL, *words(EIGHT, "--max_steps 100000"), "--data",
                            toy_csv, "--out_dir", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("step     6"):
            run.send_signal(signal.SIGINT)
            break
    said = run.stdout.read().splitlines()[-1]
    assert run.wait(timeout=60) == 130 and f"--resume --out_dir {tmp_path}" in said
    step = saved(tmp_path)["step"]
    assert step >= 4 and step % 2 == 0                      # the last evaluation
    train_mlm.main([*shlex.split(said.split(".py ")[1]), "--max_steps", str(step)])
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=slow)])
def test_killed_at_any_moment(kills, toy_csv, tmp_path):
    """SIGKILL at random moments of a run that saves at every step: it goes on and ends with the same bits."""
    rng, out = np.random.default_rng(kills), tmp_path / "killed"
    last, flags = out / "last.pt", words("--max_steps", 20 * kills, "--eval_every 1")
    command = [sys.executable, "train_mlm.py", "--out_dir", str(out)]
    for kill in range(kills + 1):
        was = last.stat().st_mtime_ns if last.exists() else 0
        how = ["--resume"] if was else [*SMALL, "--data", toy_csv, *flags]
        run = subprocess.Popen([*command, *how], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)
        if kill < kills:
            while not last.exists() or last.stat().st_mtime_ns == was:          # until it saves
                assert run.poll() is None, run.stderr.read()
                time.sleep(0.005)
            time.sleep(rng.random() / 5)
            run.kill()
        assert run.wait(timeout=300) in (-signal.SIGKILL, 0), run.stderr.read()
    train(toy_csv, tmp_path / "whole", *flags)
    assert same_bits(out, tmp_path / "whole") and not list(out.glob("*.tmp"))


def test_a_full_disk_is_one_sentence_and_loses_nothing(finished, toy_csv, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    code = ("import resource, sys, train_mlm; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
            "train_mlm.main(sys.argv[1:])")
    run = python("-c", code, "--resume", "--max_steps", 10, "--out_dir", tmp_path)
    assert run.returncode == 2 and "cannot be written" in run.stderr and "Traceback" not in run.stderr
    before, after = ({f.name: f.read_bytes() for f in out.glob("*.pt*")} for out in (finished, tmp_path))
    assert before == after                                  # and no half file beside them


def in_parts(batch, args, generators, step=None, case=None):
    """The objective of equal parts of a batch, each with its own generator, joined."""
    size = len(batch.valid) // len(generators)
    parts = [OBJECTIVE(Batch(*x), args, generator, step, case)
             for *x, generator in zip(*(x.split(size) for x in batch), generators)]
    return [type(first)(*(torch.cat(x) for x in zip(first, *others))) for first, *others in zip(*parts)]


def test_small_batches_accumulate_to_one_large_step(toy_csv, tmp_path, monkeypatch):
    """Micro-batches with different numbers of hidden cells weigh as in one batch: one division a step."""
    def window_by_window(batch, args, generator, step=None, case=None):
        own = [step_generator(int(1e6 * x.abs().sum())) for x in batch.numeric]         # whatever the batch
        return in_parts(batch, args, own, step, case)
    monkeypatch.setattr(train_mlm, "objective", window_by_window)
    flags = "--max_steps 3 --warmup_steps 0"
    train(toy_csv, tmp_path / "whole", flags, "--batch_size 8")
    train(toy_csv, tmp_path / "parts", flags, "--batch_size 2 --grad_accum 4")
    whole, parts = saved(tmp_path / "whole")["model"], saved(tmp_path / "parts")["model"]
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


def test_learning_rate_starts_above_zero_and_ends_at_the_floor():
    args = mlm_args("--lr 1 --min_lr 0.1 --warmup_steps 10 --max_steps 100")
    rates = [train_mlm.get_lr(s, args) for s in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1 and rates[-1] == pytest.approx(0.1)
    assert train_mlm.get_lr(0, mlm_args("--warmup_steps 0 --max_steps 1")) > 0


def test_never_worse_than_the_closed_form_on_val(tmp_path):
    """The untrained model is its base, and best.pt is what val likes best: what does not help is not used."""
    pd.DataFrame(random_rows(800).numpy(), columns=list("abc")).to_csv(tmp_path / "in.csv", index=False)
    for script, rival in ((train_mlm, "gauss"), (train_ar, "ar")):
        history = train(tmp_path / "in.csv", tmp_path, "--lr 0.5 --max_steps 20 --eval_every 10", script=script)
        assert saved(tmp_path, "best.pt")["step"] == 0 and history[-1]["val"] > 1       # ruined, and not kept
        found = results(tmp_path)["test"]
        found = found.get("cell", found)
        assert found["model"] == found[rival]


@pytest.mark.parametrize("flags", [
    "--mask_span 1", "--base linear", "--mask_share 0.8 --random_share 0.1", "--mask_prob_start 0.05", "--mask_spread 0",
    "--mask_prob 0.95", "--mask_prob 0.6 --mask_span 3", "--score observed", "--mixup 0.5",
    "--mask_span 1.2 --mask_prob 0.08 --eval_mask_probs 0.1", "--dtype bfloat16",
    "--loss huber --grad_accum 2", "--dtype float16", "--scaler robust --seq_len 1",
    "--drop_cols sign date", "--drop_cols wave mirror", "--categorical_cols wave", "--seq_len 100000",
    "--max_steps 0"])
def test_flags_run(flags, toy_csv, tmp_path, capsys):
    history = train(toy_csv, tmp_path, "--max_steps 2", flags)
    # float16 begins with too large a loss scale: the first norms are inf, their steps left out
    finite = ("train", "val") if "float16" in flags else ("train", "val", "norm")
    assert all(math.isfinite(row[name]) for row in history for name in finite)
    assert (tmp_path / "results.json").exists()
    assert "pip install matplotlib" in capsys.readouterr().out and not list(tmp_path.glob("*.png"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("script", [train_mlm, train_ar])
@pytest.mark.parametrize("flags", ["", "--dtype float16", "--dtype float32", "--compile"])
def test_a_gpu_trains(script, flags, toy_csv, tmp_path):
    history = train(toy_csv, tmp_path, "--device cuda --max_steps 20", flags, script=script)
    assert math.isfinite(history[-1]["val"]) and history[-1]["val"] < 1.1 * history[0]["val"]


@pytest.mark.parametrize("script", [train_mlm, train_ar])
def test_a_table_without_numbers_is_trained_and_drawn(script, toy_csv, tmp_path):
    train(toy_csv, tmp_path, "--drop_cols wave mirror", script=script, pictures=True)
    assert len(list(tmp_path.glob("*.png"))) == 3


@pytest.mark.parametrize("script", [train_mlm, train_ar])
def test_planets_are_drawn_in_the_plane(script, tmp_path, monkeypatch):
    monkeypatch.setitem(data.SIMULATIONS, "planets", lambda: data.simulate_planets(20))
    train("planets", tmp_path, "--seq_len 20", script=script, pictures=True)
    assert "model" in str(results(tmp_path)["test"]) and (tmp_path / "window.png").stat().st_size > 5000


def test_help_lists_every_flag_with_help_and_default():
    parser = train_mlm.get_parser()
    text = re.sub(r"\s+", " ", parser.format_help())
    for action in parser._actions[1:]:
        assert action.help and action.option_strings[0] in text, action.dest
        assert f"(default: {action.default})".replace("%%", "%") in text, action.dest


def test_below_the_marker_the_two_scripts_are_one():
    """Forking one of them? Then this test has done its work: delete it."""
    bottoms = [(ROOT / name).read_text().split("# ---- from here to the end")[1] for name in SCRIPTS]
    assert bottoms[0] == bottoms[1]
    ours, theirs = vars(mlm_args()), vars(ar_args())        # flags and defaults, in the order of --help
    assert [name for name in ours if name in theirs] == [name for name in theirs if name in ours]
    for name in ours.keys() & theirs.keys() - {"data", "out_dir", "max_steps", "category_weight", "base", "cycles"}:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("name,lines,characters,tokens", [
    ("data.py", 1270, 48, 13), ("masking.py", 372, 45.5, 13.5), ("model.py", 396, 45.5, 13.5),
    ("train_mlm.py", 450, 48, 12), ("train_ar.py", 450, 48, 12.5)])
def test_the_files_stay_small_and_plain(name, lines, characters, tokens):
    """Lines of the file; characters and tokens a line of code, without comments and docstrings."""
    source = (ROOT / name).read_text()
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    docs = {line for node in nodes if ast.get_docstring(node) for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    code, count = {}, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
                              tokenize.ENDMARKER) and token.start[0] not in docs:
            count += 1
            code.update({row: source.split("\n")[row - 1] for row in range(token.start[0], token.end[0] + 1)})
    mean = np.mean([len(line.split("  #")[0].strip()) for line in code.values()])
    assert source.count("\n") <= lines and mean <= characters and count / len(code) <= tokens
    longest = max((node.end_lineno - node.lineno, node.name) for node in nodes[1:] if node.name not in ("main", "Table"))
    assert longest[0] <= 50 or longest[1][0].isupper(), longest


def test_autoregression_beats_its_baselines(tmp_path):
    toy(1000, noise=0.05).to_csv(tmp_path / "calm.csv", index=False)
    history = train(tmp_path / "calm.csv", tmp_path, LEARN, "--n_layer 2 --batch_size 32 --max_steps 200",
                    "--base last --eval_every 100 --season 4 --given 16 --horizons 1 5 10",
                    script=train_ar, pictures=True)
    assert history[-1]["val"] < 0.7 * history[0]["val"]
    found = results(tmp_path)
    assert set(found) == FACTS | {"horizons"} and found["horizons"] == [1, 5, 10]
    ours = found["test"].pop("model")
    assert set(found["test"]) == {"last", "linear", "season", "ar"}
    for name in ("last", "linear", "season"):
        theirs = found["test"][name]
        assert set(theirs) == {"next_mse", "next_accuracy", "rollout_mse"}
        assert ours["next_mse"] < 0.8 * theirs["next_mse"]
        assert all(a < 0.8 * b for a, b in zip(ours["rollout_mse"][1:], theirs["rollout_mse"][1:]))
    assert all((tmp_path / name).stat().st_size > 5000 for name in PICTURES)


def test_a_roll_out_asks_for_test_rows_alone():
    frame = pd.DataFrame({"x": np.arange(300.0)})
    table, one_group = table_of(frame, "--scaler none"), table_of(frame.assign(g="a"), "--scaler none --group_col g")
    args = ar_args("--given 10 --horizons 19 --eval_stride 1")
    windows = train_ar.rollout_windows(table, args)
    assert torch.equal(train_ar.rollout_windows(one_group, args), windows)
    rows = table.batch(windows).rows(0, 29).numeric[..., 0] + table.schema.center[0]
    assert rows[:, 10:].min().round() == 255 and rows.max().round() == 299      # the test rows, all of them
    assert rows[0, 0].round() == 245                                            # naive starts: 159 to 204
    table = table_of(data.simulate_planets(60), "--data planets")
    windows = train_ar.rollout_windows(table, ar_args())
    assert torch.equal(windows, table.segments["test"])                         # rows 0 to 9 of each system


def test_the_final_roll_out_takes_a_column_empty_in_train_and_no_dropout(tmp_path, monkeypatch):
    real, modes = train_ar.report_test, []
    monkeypatch.setattr(train_ar, "report_test", lambda net, *a: modes.append(net.training) or real(net, *a))
    toy().assign(late=[None] * 350 + ["p"] * 50).to_csv(tmp_path / "late.csv", index=False)
    train(tmp_path / "late.csv", tmp_path, "--dropout 0.5", script=train_ar)
    assert modes == [False] and (tmp_path / "results.json").exists()


def test_jitter_leaves_alone_what_does_not_move():
    batch = random_batch(B=2, T=8, N=1, K=0, missing=0)
    observed = torch.ones(2, 8, 1).bool()
    observed[:, :2] = False                                 # the first known row has no step
    still = batch._replace(numeric=torch.full((2, 8, 1), 3.0) * observed, observed=observed)
    assert torch.equal(masking.jitter(still, 0.5, step_generator(0)).numeric, still.numeric)
    moving = still._replace(numeric=still.numeric * torch.arange(8)[None, :, None])
    off = masking.jitter(moving, 0.5, step_generator(0)).numeric != moving.numeric
    assert off[:, 3:].all() and not off[:, :3].any()


def test_autoregression_stops_resumes_and_runs_in_bfloat16(toy_csv, tmp_path):
    train(toy_csv, tmp_path / "whole", script=train_ar)
    train(toy_csv, tmp_path / "parts", "--max_steps 2", script=train_ar)        # both steps are warmup
    assert not same_bits(tmp_path / "whole", tmp_path / "parts")
    resume(tmp_path / "parts", "--max_steps 4", script=train_ar)
    assert same_bits(tmp_path / "whole", tmp_path / "parts")
    history = train(toy_csv, tmp_path / "half", "--dtype bfloat16 --loss huber", script=train_ar)
    assert all(math.isfinite(row["train"]) for row in history)


# -----------------------------------------------------------------------------
# bad input: one sentence, exit code 2, nothing overwritten

def refused(run, capsys, says):
    """The run ends with code 2 and one sentence that has in it all that `says` names, separated by " / "."""
    with pytest.raises(SystemExit) as stopped:
        run()
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in message
    last = message.strip().splitlines()[-1]
    assert "error: " in last and all(part in last for part in says.split(" / ")), message


@pytest.mark.parametrize("content,says", [
    (None, "no such file"), ("", "bad.csv"), ("a,b\n", "no rows"), ("a,b\n1,2\n", "--split"),
    ("a;b\n1;2\n", "--sep"), ("date\n2024-01-01\n2024-01-02\n", "no usable column"),
    ("t,x\nUTC,m/s\n" + "".join(f"2024-01-{i},{i}\n" for i in range(10, 32)), "'t' / UTC")])
def test_a_bad_file_is_one_sentence(content, says, tmp_path, capsys):
    if content is not None:
        (tmp_path / "bad.csv").write_text(content)
    refused(lambda: train(tmp_path / "bad.csv", tmp_path / "out"), capsys, says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags,says", [
    ("--time_col sign", "sign"), ("--split inf 1 1", "--split"), ("--split nan 1 1", "--split"),
    ("--mask_style span", "--mask_span"), ("--read_csv 'sep=;'", "--sep"), ("--drop_cols nope", "nope / wave"),
    ("--time_col nope", "nope"), ("--split 390 10 0", "test / --split"), ("--split 500 10 10", "520 / 400"),
    ("--split 0.7 0.2 0.2", "exceed 1"), ("--numeric_cols sign", "sign / number"),
    ("--n_embd 30 --n_head 4", "--n_embd 30 / --n_head 4"), ("--mask_prob 0", "--mask_prob"),
    ("--mask_prob 1", "--mask_prob"), ("--mask_span 0.5", "--mask_span"),
    ("--mask_share 0.8 --random_share 0.3", "--mask_share / --random_share"), ("--clip 0", "--clip"),
    ("--fill nowhere/filled.csv", "--fill / nowhere"), ("--fill x.xlsx", ".csv"),
    ("--mask_pro 0.2", "--mask_pro"), ("--batch_size 0", "--batch_size"), ("--device cuda:99", "--device"),
    ("--resume", "no such checkpoint")])
def test_a_bad_flag_is_one_sentence(flags, says, toy_csv, tmp_path, capsys):
    refused(lambda: train(toy_csv, tmp_path / "out", flags), capsys, says)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_table_or_none_is_refused_and_kept(finished, toy_csv, tmp_path, capsys):
    out, other = finished, tmp_path / "other.csv"
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    toy(seed=5).rename(columns={"wave": "surf"}).to_csv(other, index=False)
    refused(lambda: resume(out, "--data", other), capsys, "wave")
    refused(lambda: resume(out, "--n_embd 32"), capsys, "another shape")
    refused(lambda: resume(out, "--n_head 4"), capsys, "another shape")         # same weights
    refused(lambda: resume(out, script=train_ar), capsys, "train_ar.py")        # which look alike
    assert before == {f.name: f.read_bytes() for f in out.iterdir()}
    (tmp_path / "last.pt").write_bytes((out / "last.pt").read_bytes()[:1000])
    refused(lambda: resume(tmp_path), capsys, "cannot be read")
    torch.save({"weights": torch.ones(2)}, tmp_path / "last.pt")                # somebody else's
    refused(lambda: resume(tmp_path), capsys, "cannot be read")


def test_an_out_dir_that_cannot_be_written(toy_csv, tmp_path, capsys):
    refused(lambda: train(toy_csv, f"{toy_csv}/out"), capsys, "out / cannot be written")
    (tmp_path / "log.csv").mkdir()                          # in the way
    refused(lambda: train(toy_csv, tmp_path), capsys, "log.csv / cannot be written")


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)
    for write in (lambda path: torch.save({"model": Malicious()}, path),
                  lambda path: path.write_bytes(pickle.dumps(Malicious(), protocol=2))):
        write(tmp_path / "last.pt")
        refused(lambda: resume(tmp_path), capsys, "cannot be read")
    assert not (tmp_path / "owned").exists()
    with contextlib.suppress(Exception):                    # naive
        torch.load(tmp_path / "last.pt", weights_only=False)
    assert (tmp_path / "owned").exists()


# -----------------------------------------------------------------------------
# the user's own file: filled, continued, as it was

def stamp(i, form="%d.%m.%Y %H:%M"):
    return (pd.Timestamp("2024-01-30 22:00") + pd.Timedelta(minutes=15 * i)).strftime(form)


def own_files():
    """Files in the manner of real exports: {name: (bytes, flags, {column position: what marks a hole})}."""
    rng, wave = np.random.default_rng(0), np.sin(np.arange(160) / 9)
    hole = lambda text, mark="": mark if rng.random() < 0.15 else text
    european = "\ufeffZeit;Temp.;Zähler;Kennung;Zustand;leer\r\n" + "".join(
        f'{stamp(i)};{hole(f"{20 + 3 * w:.2f}".replace(".", ","))};{hole(str(100 + i))};{hole("007")};'
        f'{hole(chr(34) + ("an; offen" if w > 0 else "aus") + chr(34))};\r\n' for i, w in enumerate(wave))
    logger = "time,flow,alarm,flow,code\n" + "".join(
        f'{stamp(i // 2, "%Y-%m-%dT%H:%M:%S")}{"+01:00" if i % 3 else "+02:00"},{hole(f"{w:.1f}", "?")},'
        f'{hole("TRUE" if w > 0.5 else "FALSE")},'
        f'{hole(f"{50 * w:.0f}", str(rng.choice(["-1.18e42", "inf"])))},'
        f'{"Z" if i > 150 else "A"}\n' for i, w in rng.permutation(list(enumerate(wave))))
    names = "a,b,c\n" + "".join(f'{i},{hole(f"{round(9 * w)}.0")},{hole("1.50" if w > 0 else "2.25")},0\n'
                              for i, w in enumerate(wave))              # a name for each row, and none for these
    wells = "well,day,level,rain\n" + "".join(
        f'{well:03d},{stamp(96 * i, "%Y-%m-%d")},{hole(f"{w + well:.3f}")},'
        f'{hole("dry" if w > 0 else "wet")}\n'
        for i, w in enumerate(wave) for well in range(1, 6) if i < 20 * well + 40)
    return {"european.csv": (european.encode(), "--sep ';' --decimal , --categorical_cols Kennung",
                             {1: {""}, 2: {""}, 3: {""}, 4: {""}}),
            "logger.csv": (logger.encode(), "", {1: {"?"}, 2: {""}, 3: {"-1.18e42", "inf"}}),
            "names.csv": (names.encode(), "", {1: {""}, 2: {""}}),
            "export.csv": (("i," + names).replace("a,b,", "a,a,").encode(), "--na_values 2.25 'No Data'",
                           {1: {""}, 2: {"", "2.25"}}),
            "cp1252.csv": (wells.replace("dry", "trüb").encode("cp1252"), "--encoding cp1252 --group_col well",
                           {2: {""}, 3: {""}}),
            "wells.csv.gz": (gzip.compress(wells.encode()), "--group_col well", {2: {""}, 3: {""}})}


def cells_of(path, sep=",", encoding="utf-8-sig"):
    """Every cell of a .csv as it is written, by position."""
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", encoding=encoding, newline="") as file:
        return pd.DataFrame(list(csv.reader(file, delimiter=sep))).fillna("")


@pytest.mark.parametrize("name", own_files())
def test_a_file_is_filled_and_otherwise_as_it_was(name, tmp_path, capsys):
    content, flags, marks = own_files()[name]
    (tmp_path / name).write_bytes(content)
    out = tmp_path / f"filled_{name}"
    train(tmp_path / name, tmp_path / "out", "--fill", out, flags)
    said, sep = capsys.readouterr().out, ";" if "sep" in flags else ","
    encoding = "cp1252" if "cp1252" in flags else "utf-8-sig"
    before, after = cells_of(tmp_path / name, sep, encoding), cells_of(out, sep, encoding)
    holes = pd.DataFrame({j: before[j].isin(marks.get(j, ())) for j in before})
    holes.iloc[0] = False                                   # the header
    assert ((after == before) | holes).all(axis=None) and (holes.any()[list(marks)]).all()
    for j in marks:
        own = before[j][~holes[j]][1:]                      # numbers have as many decimals
        decimals = own[own.str.fullmatch(r"-?\d+[.,]\d+")].str.replace(r".*[.,]", "", regex=True).str.len()
        number = rf"-?\d+[.,]\d{{{decimals.iloc[0]}}}" if len(decimals) else r"-?\d+"
        filled = after[j][holes[j]]
        assert (filled.isin(own) | filled.str.fullmatch(number)).all(), filled
    table = said[said.index("filled cells"):]
    counts = [int(n) for n in re.findall(r"^\S.* (\d+) +[-\d.e+]+ +[-\d.e+]+$", table, re.M)]
    assert sum(counts) == holes.sum().sum()                 # what it says is what it did
    assert ("left empty" in said) == (name == "european.csv")
    naive = pd.read_csv(io.StringIO("a\n007\n1.50\n"), dtype=None).to_csv(index=False)
    assert naive == "a\n7.0\n1.5\n"                         # what pandas alone gives back


def kinds_of_files():
    """What public files were like that once went wrong: {name: (text, flags, what comes next or None, refusal)}."""
    wave = [f"{20 + 5 * np.sin(i / 5):.1f}" for i in range(120)]
    def rows(header, times):
        return header + "\n" + "".join(f"{t},{x}\n" for t, x in zip(times, wave))
    days = pd.date_range("2022-01-01", periods=120)
    hours = pd.date_range("2018-01-01", periods=120, freq="10min")
    months = pd.date_range("2000-01-01", periods=120, freq="MS")
    workdays = pd.date_range("2024-01-01", periods=120, freq="B")
    unpadded = [f"{t.year}/{t.month}/{t.day}" for t in days]
    return {
        "yyyymmdd": (rows("date,x", days.strftime("%Y%m%d")), "", "20220501", None),
        "year, month, day": (rows("year,month,day,x", [f"{t.year},{t.month},{t.day}" for t in days]), "", "2022,5,1", None),
        "date and time": (rows("Date,Time,x", hours.strftime("%Y-%m-%d,%H:%M:%S")), "", "2018-01-01,20:00:00", None),
        "joined by a flag": (rows("Day,Clock,x", hours.strftime("%d.%m.%Y,%H:%M")), "--time_col Day Clock",
                             "01.01.2018,20:00", None),
        "unpadded": (rows("date,x", unpadded), "", "2022/5/1", None),
        "month names": (rows("Date,x", months.strftime('"%B %d, %Y"')), "", '"January 01, 2010"', None),
        "newest first": (rows("Date,x", days[::-1].strftime("%d-%b-%Y")), "", "01-May-2022", None),
        "epoch": (rows("timestamp,x", (hours.astype("datetime64[s]").astype("int64"))), "", "1514836800", None),
        "day first": (rows("t,x", hours.strftime("%d/%m/%Y %H:%M")), "", "01/01/2018 20:00", None),
        "month first": (rows("t,x", days.strftime("%m/%d/%Y")), "", "05/01/2022", None),
        "months": (rows("month,x", months.strftime("%Y-%m-%d")), "", "2010-01-01", None),
        "the 15th": (rows("t,x", (months + pd.Timedelta(days=14)).strftime("%Y-%m-%d")), "", "2010-01-15", None),
        "quarters": (rows("t,x", [f"{t.month}/{t.day}/{t.year}" for t in pd.date_range("1990-01-01", periods=120, freq="QS")]),
                     "", "1/1/2020", None),
        "compact": (rows("time,x", hours.strftime("%Y%m%d%H%M")), "", "201801012000", None),
        "opening hours": (rows("t,x", [t for t in pd.date_range("2024-01-01 00:00", periods=800, freq="h").strftime(
            "%Y-%m-%d %H:%M") if "10:00" <= t[11:] <= "17:00"][:120]), "", "2024-01-15 18:00", None),
        "steps of 0.1": (rows("t,x", [f"{i / 10:g}" for i in range(120)]), "--time_col t", "12.0", None),
        "an installation date": (rows("t,installed,x", hours.strftime("%Y-%m-%d %H:%M,2017-05-01")), "",
                                 "2018-01-01 20:00,", None),
        "weeks": (rows("t,x", [f"2024-W{i % 52 + 1:02d}" for i in range(120)]), "", None, "'t' / --time_format"),
        "one day, either": (rows("t,x", pd.date_range("2024-02-03", periods=120, freq="5min").strftime("%d/%m/%Y %H:%M")),
                            "", None, "--time_format"),
        "business days": (rows("t,x", workdays.strftime("%Y-%m-%d")), "", "2024-06-17", None),
        "zones": (rows("t,x", hours.strftime("%Y-%m-%dT%H:%M:%SZ")), "", "2018-01-01T20:00:00Z", None),
        "by a flag": (rows("t,x", days.strftime("%y|%d|%m")), "--time_col t --time_format '%y|%d|%m'", "22|01|05", None),
        "ranges": (rows("MTU (CET),x", [f"{t:%d.%m.%Y %H:%M} - {t:%H:%M}" for t in hours]), "", None, "MTU (CET) / --drop_cols"),
        "a clock alone": (rows("Time,x", list(hours.strftime("%H:%M")[:60]) * 2), "", None, "Time / --time_col"),
        "no step": (rows("t,x", ["2024-01-01"] * 120), "", None, "--forecast / --group_col")}


@pytest.mark.parametrize("kind", kinds_of_files())
def test_time_is_understood_or_refused_and_goes_on_as_the_file_writes_it(kind, tmp_path, capsys):
    text, flags, coming, refusal = kinds_of_files()[kind]
    (tmp_path / "in.csv").write_text(text)
    run = lambda: train(tmp_path / "in.csv", tmp_path / "out", flags, "--forecast 3 --to", tmp_path / "next.csv",
                        script=train_ar)
    if refusal:
        refused(run, capsys, refusal)
        assert not (tmp_path / "out").exists()              # before training
        return
    run()
    header, first = (tmp_path / "next.csv").read_text().splitlines()[:2]
    assert header == text.splitlines()[0] and first.rpartition(",")[0] == coming


def test_ambiguous_days_are_read_so_that_steps_are_even():
    stamps = pd.date_range("2018-01-01", periods=600, freq="10min")             # no day beyond 12
    table = table_of({"t": stamps.strftime("%d/%m/%Y %H:%M"), "x": np.arange(600.0)})
    assert (table.axis.stamps.to_numpy() == stamps.to_numpy()).all() and table.axis.patterns == ["%d/%m/%Y %H:%M"]
    naive = pd.to_datetime(stamps.strftime("%d/%m/%Y %H:%M"))
    assert naive.max() - naive.min() > pd.Timedelta(days=100)                   # month first: four months


def test_levels_beyond_the_train_rows_are_filled_between_neighbours_and_go_on(tmp_path):
    level = np.exp(np.arange(300) / 40)
    frame = pd.DataFrame({"day": pd.date_range("2020-01-01", periods=300), "cases": level.round()})
    holes = [270, 280, 281, 290]
    frame.assign(cases=frame["cases"].mask(frame.index.isin(holes))).to_csv(tmp_path / "in.csv", index=False)
    train(tmp_path / "in.csv", tmp_path / "out", "--fill", tmp_path / "filled.csv")
    filled = pd.read_csv(tmp_path / "filled.csv")["cases"]
    for hole in holes:
        assert 0.8 * level[hole] < filled[hole] < 1.2 * level[hole]
    train(tmp_path / "in.csv", tmp_path / "ar", "--forecast 3 --to", tmp_path / "next.csv", script=train_ar)
    assert pd.read_csv(tmp_path / "next.csv")["cases"].between(0.7 * level[-1], 1.6 * level[-1]).all()


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 200), marks=slow)])
def test_no_cell_that_was_there_changes_and_none_is_written_that_cannot_be(seeds, tmp_path, monkeypatch):
    """Files with any order, index, blank rows and duplicates: an untrained model fills and continues them."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        rows = int(rng.integers(80, 200))
        frame = pd.DataFrame({"t": pd.date_range("2024-01-01", periods=rows, freq=str(rng.choice(["h", "D", "15min"]))),
                              "share": rng.uniform(0, 100, rows).round(1), "count": rng.poisson(2, rows).astype(str),
                              "state": rng.choice(["on", "off", "naïve, quoted"], rows)})
        frame["t"] = frame["t"].dt.strftime(str(rng.choice(["%Y-%m-%d %H:%M", "%d.%m.%Y %H:%M", "%m/%d/%Y %H:%M:%S"])))
        for name in ("share", "count", "state"):
            frame[name] = frame[name].astype(object).mask(rng.random(rows) < 0.2)
        blank = rng.random(rows) < 0.03
        frame.loc[blank] = np.nan
        if rng.random() < 0.5:
            frame = frame.sample(frac=1, random_state=seed)
        if rng.random() < 0.3:
            frame = pd.concat([frame, frame.iloc[:5]])
        path = tmp_path / f"{seed}.csv"
        frame.to_csv(path, index=bool(rng.random() < 0.5))
        before = cells_of(path)
        names = before.iloc[0].tolist()
        few = ["--max_steps", "2", "--lr", "1", "--warmup_steps", "0"]          # a wild model, far off
        train(path, tmp_path / "out", *few, "--fill", tmp_path / "filled.csv")
        after = cells_of(tmp_path / "filled.csv")
        there = before != ""
        assert ((after == before) | ~there).all(axis=None)
        values = [names.index(name) for name in ("share", "count", "state")]
        blank = ~there[names.index("t")]                    # stays as it is; all other rows are filled
        assert ((after[values] == "").all(axis=1) == blank).all() and (after[values] == "").any(axis=1).equals(blank)
        train(path, tmp_path / "ar", *few, "--forecast 4 --to", tmp_path / "next.csv", script=train_ar)
        ahead = cells_of(tmp_path / "next.csv")
        for cells, high in ((after[~blank], 100), (ahead, np.inf)):
            share, count, state = (cells[j][1:] for j in values)
            assert pd.to_numeric(share).between(0, high).all() and count.str.fullmatch(r"\d+").all()
            assert state.isin(["on", "off", "naïve, quoted"]).all()
        form = re.sub(r"\d", r"\\d", re.escape(frame["t"].dropna().iloc[0]))
        assert ahead[names.index("t")][1:].str.fullmatch(form).all()


def test_rows_without_a_stamp_stay_and_say_nothing(tmp_path, capsys):
    frame = pd.DataFrame({"t": pd.date_range("2024-01-01", periods=120, freq="h").astype(str), "x": np.arange(120.0)})
    frame.loc[10, "t"] = np.nan
    frame.loc[[10, 50], "x"] = np.nan
    frame.to_csv(tmp_path / "in.csv", index=False)
    train(tmp_path / "in.csv", tmp_path, "--fill", tmp_path / "filled.csv")
    filled = pd.read_csv(tmp_path / "filled.csv")
    assert filled.isna().sum().tolist() == [1, 1] and abs(filled["x"][50] - 50) < 3
    assert "1 rows" in capsys.readouterr().out
    train(tmp_path / "in.csv", tmp_path, "--forecast 2 --base last --to", tmp_path / "next.csv", script=train_ar)
    assert pd.read_csv(tmp_path / "next.csv")["x"].between(115, 125).all()      # from the end, not from row 10


def test_runs_of_holes_are_measured_where_they_are_filled():
    frame = toy(400).drop(columns=["sign"])
    for start in range(20, 400, 40):
        frame.loc[start:start + 7, ["wave", "mirror"]] = np.nan                 # outages: a stamp, no values
    assert 3 < data.default_span(table_of(frame, "--seq_len 64")) < 8
    assert data.default_span(table_of(toy(400), "--seq_len 64")) < 2


def test_absent_rows_are_counted_and_inserted(tmp_path, capsys):
    frame = toy(200).drop(columns=["mirror", "sign"]).drop(index=[50, 51, 120])
    frame.to_csv(tmp_path / "in.csv", index=False)
    data.describe(load_table(data_args("--data", tmp_path / "in.csv")), data_args("--data", tmp_path / "in.csv"))
    assert "3 absent" in (said := capsys.readouterr().out) and "--regular" in said
    train(tmp_path / "in.csv", tmp_path / "out", "--regular --fill", tmp_path / "filled.csv")
    filled = pd.read_csv(tmp_path / "filled.csv", parse_dates=["date"])
    assert (filled["date"] == toy(200)["date"]).all() and filled["wave"].notna().all()
    kept = frame["wave"].notna()
    assert (filled["wave"][frame.index[kept]] == frame["wave"][kept]).all()
    uneven = {"t": toy(200)["date"] + pd.to_timedelta(np.arange(200) ** 2, unit="s"), "x": 1.0}
    refused(lambda: table_of(uneven, "--regular"), capsys, "--regular")


def test_hints_name_their_flag_and_unlike_groups_are_not_filled(tmp_path, capsys):
    rng = np.random.default_rng(0)
    def hints(frame, *flags):
        return " ".join(data.find_hints(table_of(frame, "--seq_len 8", *flags), data_args(*flags)))
    stamps = np.repeat(pd.date_range("2024-01-01", periods=60, freq="h").astype(str), 3)
    long = pd.DataFrame({"t": stamps, "what": ["HR", "BP", "T"] * 60, "value": rng.normal(size=180)})
    assert "--group_col what" in hints(long) and "--group_col" not in hints(long, "--group_col what")
    spoilt = pd.DataFrame(rng.normal(50, 3, (200, 3)), columns=list("abc")).mask(rng.random((200, 3)) < 0.1, -200)
    assert "--na_values -200" in hints(spoilt) and hints(spoilt.clip(lower=0, upper=60).replace(0, 50)) == ""
    assert "--categorical_cols" in hints({"id": [f"id{i}" for i in range(1500)], "x": rng.normal(size=1500)})
    unlike = pd.DataFrame({"g": np.repeat(list("abcd"), 60), "x": np.repeat([1e6, 2e6, 1.5e6, 2.0], 60)})
    unlike["x"] = (unlike["x"] * rng.uniform(0.5, 1.5, 240)).mask(rng.random(240) < 0.1)
    assert "x" in hints(unlike, "--group_col g")
    unlike.to_csv(tmp_path / "in.csv", index=False)
    refused(lambda: train(tmp_path / "in.csv", tmp_path / "out", "--group_col g --fill", tmp_path / "f.csv"),
            capsys, "'x' / group")


def test_describe_fits_on_a_screen(capsys):
    wide = pd.DataFrame(np.random.default_rng(0).normal(size=(200, 80)))
    for table, flags in ((table_of(toy()), ""), (table_of(wide.rename(columns=str)), "")):
        data.describe(table, data_args(flags))
        assert len(capsys.readouterr().out.splitlines()) <= 30


def test_one_column_with_blank_lines_for_holes(tmp_path):
    (tmp_path / "in.csv").write_text("x\n" + "".join(f"{i}.25\n\n" for i in range(60)))
    train(tmp_path / "in.csv", tmp_path, "--fill", tmp_path / "out.csv")
    before, after = ((tmp_path / name).read_text().splitlines() for name in ("in.csv", "out.csv"))
    assert all(new == old or not old for old, new in zip(before, after, strict=True))


def test_a_simulation_is_filled_beside_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(data.SIMULATIONS, "sensors", lambda: data.simulate_sensors(400))
    monkeypatch.chdir(tmp_path)
    Path("sensors").mkdir()
    train("sensors", tmp_path, "--fill filled.csv")
    assert len(pd.read_csv("filled.csv")) == 400


def test_parquet_is_filled_into_a_csv(tmp_path):
    pytest.importorskip("pyarrow")
    seconds = pd.Series(np.arange(400) % 7 + 0.5).mask(np.arange(400) % 5 == 2).to_numpy()
    frame = toy().assign(whole=pd.array([3, None] * 200, dtype="Int64"), spent=pd.to_timedelta(seconds, unit="s"))
    for kept in (frame.set_index("date"), frame.set_index(pd.RangeIndex(1000, 1400))[50:]):     # dates, and a slice
        kept.to_parquet(tmp_path / "toy.parquet")
        train(tmp_path / "toy.parquet", tmp_path, "--fill", tmp_path / "filled.csv")
        filled = pd.read_csv(tmp_path / "filled.csv", parse_dates=["date"], dtype={"wave": str})
        own = frame[-len(filled):].reset_index(drop=True)
        assert filled["wave"].notna().all() and (filled["whole"] == 3).all()
        assert (filled["date"].to_numpy() == own["date"].to_numpy()).all()
        there = own["wave"].notna()
        assert np.array_equal(filled["wave"][there].astype(float), own["wave"][there])          # to the bit
        there = own["spent"].notna()
        assert (filled["spent"] == own["spent"].dt.total_seconds())[there].all()                # in seconds


def test_filling_is_what_the_model_says_and_resuming_only_fills(finished, toy_csv, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    resume(tmp_path, "--fill", tmp_path / "filled.csv")
    assert same_bits(finished, tmp_path)
    assert (finished / "log.csv").read_bytes() == (tmp_path / "log.csv").read_bytes()
    table = load_table(mlm_args("--seq_len 16 --data", toy_csv))
    net = saved_model(tmp_path)
    frame, filled = toy(), pd.read_csv(tmp_path / "filled.csv")
    row = next(i for i in range(100, 300) if np.isnan(frame["wave"][i]) and i % 8 == 0)
    numbers, _ = net.predict(table.batch(torch.tensor([[row - 8, 400]])))       # the window in whose middle it stands
    said = numbers[0, 8, 0] * table.schema.scale[0] + table.schema.center[0]
    assert filled["wave"][row] == pytest.approx(float(said), abs=1e-5)


def test_each_hole_is_filled_from_well_inside_a_window(monkeypatch):
    """Every row is answered for, and never by a window that sees less than a quarter of itself before it."""
    groups = np.repeat(list("abcdef"), [3, 40, 16, 77, 17, 1])
    table = table_of({"g": groups, "x": np.arange(154.0)}, "--group_col g --seq_len 16 --scaler none")
    class Place:                                            # answers with the place in the window, 1 and on
        predict = lambda self, batch: (torch.arange(1.0, 17).view(1, 16, 1), torch.zeros(1, 16, 0).long())
    place = train_mlm.predict_rows(Place(), table)[0].flatten() - 1
    begins = torch.zeros(154, dtype=torch.bool)
    begins[table.segments["all"][:, 0]] = True
    since = (torch.arange(154) - torch.where(begins, torch.arange(154), 0).cummax(0).values)
    assert ((place >= 4) | (place == since)).all() and (place >= 0).all()       # 4: a quarter of 16


def test_a_trained_model_fills_another_file_by_its_own_scales(finished, tmp_path):
    toy(120, seed=3).to_csv(tmp_path / "other.csv", index=False)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    resume(tmp_path, "--data", tmp_path / "other.csv", "--fill", tmp_path / "filled.csv")
    assert same_bits(finished, tmp_path) and saved(tmp_path)["schema"] == saved(finished)["schema"]
    assert pd.read_csv(tmp_path / "filled.csv").notna().all(axis=None)


def test_the_future_is_written_for_each_group(tmp_path):
    rows = [f"{well:03d},{stamp(i)},{i % 7}.{i % 10}0,{'wet' if i % 3 else 'dry'}\n"
            for i in range(60) for well in range(6) if i < 30 + 5 * well]
    (tmp_path / "wells.csv").write_text("well,Zeit,level,weather\n" + "".join(rows))
    train(tmp_path / "wells.csv", tmp_path, "--group_col well --forecast 5 --to", tmp_path / "next.csv",
          script=train_ar)
    rows = pd.read_csv(tmp_path / "next.csv", dtype=str)
    assert list(rows) == ["well", "Zeit", "level", "weather"] and len(rows) == 30
    for well in range(6):
        expected = [stamp(i) for i in range(30 + 5 * well, 35 + 5 * well)]
        assert rows["Zeit"][rows["well"] == f"{well:03d}"].tolist() == expected
    assert rows["level"].str.fullmatch(r"\d+\.\d\d").all() and rows["weather"].isin(["dry", "wet"]).all()


def test_the_forecast_is_the_roll_out_from_the_last_rows(toy_csv, tmp_path):
    train(toy_csv, tmp_path, "--drop_cols date --forecast 3 --to", tmp_path / "next.csv", script=train_ar)
    table = load_table(ar_args("--seq_len 16 --drop_cols date --data", toy_csv))
    net = saved_model(tmp_path)
    rows = net.rollout(table.batch(torch.tensor([[384, 400]])), torch.zeros(1, 3, 0))
    said = rows.numeric[0, :, 0] * table.schema.scale[0] + table.schema.center[0]
    written = pd.read_csv(tmp_path / "next.csv")
    assert np.allclose(written["wave"], said, atol=1e-5)
    assert list(written) == list(toy()) and written["date"].isna().all()        # left out of training: empty


# -----------------------------------------------------------------------------
# hostile input: finite results, or one sentence and exit code 2

def hostile_column(rng, rows):
    """Values as a file might hold them, no worse than what has been seen in the wild."""
    n = rng.standard_normal(rows)
    columns = {
        "float": n, "int": (100 * n).round(), "big": [2 ** 60 + i for i in range(rows)], "bool": n > 0,
        "constant": [7] * rows, "empty": [""] * rows, "inf": np.where(n > 1, np.inf, n),
        "sentinel": np.where(n > 1, -1.18e42, n), "word": np.where(n > 0, "on", "off"),
        "comma": [f"{x:.2f}".replace(".", ",") for x in n],
        "date": pd.date_range("2024-01-01", periods=rows, freq="h").astype(str),
        "odd date": rng.choice(["9999-12-31", "0001-01-01", "2024-02-30", "2024-01-01", ""], rows),
        "mixed": rng.choice(["1", "x", "nan", "2024-01-01", "True", "-", "1e400"], rows),
        "unicode": rng.choice(["äöü", "日本", "🙂", "a,b", 'quo"te', "", " "], rows),
        "long": ["x" * 5000] * rows, "id": [f"id{i}" for i in range(rows)]}
    column = pd.Series(columns[rng.choice(list(columns))], dtype=object)
    return column.mask(pd.Series(rng.random(rows) < rng.choice([0, 0.1, 0.9])), "")


def hostile_run(seed, folder, checkpoint):
    """(script, flags) of a run that nobody would make on purpose; files in `folder`."""
    rng = np.random.default_rng(seed)
    rows, folder = int(rng.choice([1, 9, 60, 300, 300])), folder / str(seed)
    folder.mkdir()
    names = rng.choice(["a", "a", "b", "", " ", "日本", "$x_1$", "Unnamed: 0", "nan", "x_x", "x_y", "'"], 5)
    table = pd.concat([hostile_column(rng, rows) for _ in names], axis=1)
    table.to_csv(folder / "hostile.csv", header=names, index=False)
    name = str(rng.choice(names))
    extra = ["", "--seq_len 7", "--lr 0", "--split 1 1 1", "--split 0 0 1", "--clip 0.01", "--scaler robust",
             "--dtype bfloat16 --loss huber", "--batch_size 64", "--sep ';'", "--regular", "--decimal ,"]
    extra += [f"{flag} {shlex.quote(name)}" for flag in (
        "--group_col", "--time_col", "--categorical_cols", "--numeric_cols", "--drop_cols")]
    flags = ["--data", str(folder / "hostile.csv"), *words(*rng.choice(extra, 2)), "--out_dir", str(folder)]
    if rng.random() < 0.2:                                  # and a checkpoint in which some bytes are others
        broken = bytearray(checkpoint)
        for at in rng.integers(0, len(broken), rng.integers(1, 50)):
            broken[at] = rng.integers(256)
        (folder / "last.pt").write_bytes(broken[:len(broken) if rng.random() < 0.7 else len(broken) // 2])
        flags = ["--resume", "--out_dir", str(folder)]
    if rng.random() < 0.3:
        return train_ar, [*flags, "--forecast", "3", "--to", str(folder / "next.csv")]
    return train_mlm, [*flags, "--fill", str(folder / "filled.csv")]


@pytest.mark.parametrize("seeds", [range(30), pytest.param(range(30, 330), marks=slow)])
def test_hostile_input_ends_well(seeds, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    checkpoint, ends = (finished / "last.pt").read_bytes(), []
    for seed in seeds:
        script, flags = hostile_run(seed, tmp_path, checkpoint)
        small = [*SMALL, "--max_steps", "2", *AHEAD * (script is train_ar)] if flags[0] != "--resume" else []
        try:
            script.main([*small, *flags])
            found = (tmp_path / str(seed) / "results.json").read_text()
            assert "NaN" not in found and "Infinity" not in found, (seed, flags)
            ends.append(0)
        except SystemExit as stopped:
            said = capsys.readouterr().err
            assert stopped.code == 2 and "error: " in said.splitlines()[-1], (seed, flags, said)
            ends.append(2)
    assert {0, 2} <= set(ends)                              # some were well, some were not


# -----------------------------------------------------------------------------
# what was claimed about a loss that went NaN, tested one claim at a time

def broken_loss(share_missing, rate=0.0, T=16, n_embd=16, lr=1e-3, measure=F.mse_loss):
    """The recipe that went NaN, in our model: every position is scored, against the file as it is."""
    g, net = torch.Generator().manual_seed(0), model.TableTransformer(model.Config(2, [], 0, T, 1, 2, n_embd))
    optimizer, file = torch.optim.AdamW(net.parameters(), lr), torch.randn(4, T, 2, generator=g)
    there = torch.rand(file.shape, generator=g) >= share_missing
    nothing = torch.zeros(4, T, 0)
    shown = there & (torch.rand(file.shape, generator=g) >= rate)
    batch = Batch(file * there, nothing.long(), shown, torch.ones(4, T).bool(), nothing,
                  torch.arange(T).float().repeat(4, 1))
    inputs = create_inputs(batch, causal=False)
    for _ in range(3):
        loss = measure(net(inputs).numeric, torch.where(there, file, NAN))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss


@pytest.mark.parametrize("change", [
    {}, {"rate": 1e-5}, {"rate": 0.15}, {"T": 256}, {"T": 512}, {"n_embd": 128}, {"n_embd": 512},
    {"lr": 1e-5}, {"lr": 2e-5}, {"measure": F.huber_loss}, {"measure": F.smooth_l1_loss},
    {"measure": F.l1_loss}], ids=str)
def test_claim_only_missing_targets_make_the_loss_nan(change):
    """Not the mask rate, not the length, width or learning rate; and no robust loss helps."""
    assert broken_loss(0.0, **change).isfinite() and broken_loss(0.05, **change).isnan()


def test_claim_identity_reconstruction_is_no_cause(tmp_path):
    """Scoring what is shown at a mask rate of 0.00001: useless, but as calm as can be."""
    toy().ffill().bfill().to_csv(tmp_path / "whole.csv", index=False)
    history = train(tmp_path / "whole.csv", tmp_path, "--score observed --mask_prob 0.00001 --mask_spread 0 --base linear "
                    "--max_steps 30 --eval_every 30")
    assert max(row["norm"] for row in history) < 1 and history[-1]["train"] < 0.2
    assert history[-1]["val"] > 0.8                         # in units of interpolation: nothing was learnt


def test_claim_minus_infinity_as_a_mask_value_is_a_cause():
    x = torch.tensor([[-math.inf, 1.0, 2.0, 3.0]])
    assert not x.isnan().any()                              # so the check for NaN lets it through
    assert F.layer_norm(torch.nan_to_num(x) * torch.tensor([2.0, 1.0, 1.0, 1.0]), (4,)).isnan().all()


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
    """Nothing is NaN any more, and yet no row sees another: a fifth worse than the right axis from the same start."""
    toy(600, noise=0.05).to_csv(tmp_path / "toy.csv", index=False)
    errors = []
    for attention in (F.scaled_dot_product_attention, model.over_heads):
        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
        train(tmp_path / "toy.csv", tmp_path, LEARN, "--batch_size 16 --max_steps 150 --eval_every 150 --mask_span 1 --base linear")
        found = results(tmp_path)["test"]["cell"]
        errors.append(sum(found["model"]["mse"]) / sum(found["linear"]["mse"]))
    assert errors[0] < 0.8 * errors[1]


def test_claim_masks_must_have_the_layout_of_the_table():
    x, mask = torch.arange(9.0).view(1, 3, 3), torch.tensor([[[1, 0, 0], [1, 0, 0], [0, 0, 0]]]).bool()
    assert x[mask].tolist() == [0, 3] and x[mask.transpose(1, 2)].tolist() == [0, 1]  # other cells
    with pytest.raises(IndexError):
        torch.zeros(1, 4, 3)[mask]


def test_claim_any_is_no_test_of_validity():
    rows = torch.tensor([[0.0, 0.0], [NAN, 1.0], [NAN, NAN]])
    assert rows.any(dim=1).tolist() == [False, True, True]  # naive: a row of zeros is padding, NaN is not
    frame = pd.DataFrame({"w": ["a"] * 3 + ["b"] * 2 + ["c"] * 3, "x": [0.0, NAN, NAN] + [1.0] * 5})
    table = table_of(frame, "--group_col w --split 1 1 1 --seq_len 3")
    real = [table.batch(table.starts(split, 3)).valid.sum() for split in ("train", "val", "test")]
    assert sorted(real) == [2, 3, 3]


# -----------------------------------------------------------------------------
# as a user would

def commands():
    """Every `python ...` line in the README and the docstrings, without what follows a #."""
    files = ("README.md", "train_mlm.py", "train_ar.py", "data.py", "masking.py", "model.py")
    text = "\n".join((ROOT / name).read_text() for name in files)
    found = re.findall(r"^ *(?:.*&& )?python ((?:train_mlm|train_ar|data|masking|model)\.py.*)$", text, re.M)
    return sorted({c.split("#")[0].strip() for c in found})


def test_every_command_parses():
    assert len(commands()) > 8
    for script, *flags in map(shlex.split, commands()):
        if script in SCRIPTS:
            SCRIPTS[script].get_parser().parse_args(flags)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("train_") and "--resume" not in c])
def test_every_training_command_runs(command, toy_csv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                             # --fill filled.csv
    script, _, flags = command.partition(" ")
    few = [*SMALL, *AHEAD * (script == "train_ar.py"), "--data", toy_csv]
    few += ["--split 0.6 0.2 0.2"] * ("--split" in flags)   # not the row counts of another file
    few += ["--season 4"] * ("--season" in flags)
    train(toy_csv, tmp_path, flags, *few, script=SCRIPTS[script])   # the last flag wins: few steps, the toy


@pytest.mark.parametrize("command", ["data.py", "masking.py", "model.py", "model.py --leaks"])
def test_each_file_runs_by_itself(command):
    run = python("-W", "error::DeprecationWarning", *command.split())
    assert run.returncode == 0 and len(run.stdout.splitlines()) > 10, run.stderr


def test_imports_go_one_way():
    code = ("import sys, data; assert 'masking' not in sys.modules; import masking; assert 'model' not in sys.modules; "
            "import model; assert 'train_mlm' not in sys.modules")
    assert python("-c", code).returncode == 0


@etth1
def test_linear_interpolation_on_etth1_gives_the_published_numbers(tmp_path):
    train_mlm.main(words("--split 8640 2880 2880 --eval_stride 8 --max_steps 0 --data", os.environ["ETTH1"],
                         "--out_dir", tmp_path))
    found = results(tmp_path)
    assert found["eval_mask_probs"] == [0.125, 0.25, 0.375, 0.5]
    linear = found["test"]["cell"]["linear"]["mse"]
    assert linear == pytest.approx([0.0845, 0.0996, 0.1231, 0.1644], rel=0.05)


def torchrun(*argv, world=2):
    """Python as torchrun starts it, in two processes that train together, or in one."""
    return python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "--no-python",
                  sys.executable, *argv, timeout=100)


@slow
@pytest.mark.parametrize("command", ["train_mlm.py", "train_mlm.py --drop_cols sign",
                                     "train_mlm.py --drop_cols wave mirror", "train_ar.py"])
def test_two_processes_train_one_model(command, toy_csv, tmp_path):
    few = [*SMALL, *AHEAD * (command == "train_ar.py"), "--data", toy_csv, "--out_dir", tmp_path]
    run = torchrun(*command.split(), *few)
    assert run.returncode == 0, run.stderr
    assert len(pd.read_csv(tmp_path / "log.csv")) == 4 and (tmp_path / "results.json").exists()


def nan_loss(number, rank="0"):
    """model.sum_losses, but in the training step of that number, counted from 1, NaN on that rank."""
    steps, mine = [], os.environ.get("RANK", "0") == rank
    def poison(*a):
        steps.append(torch.is_grad_enabled())
        return model.sum_losses(*a) * (NAN if mine and sum(steps) == number else 1)
    return poison


def save_gradient(argv):
    """A step that saves its gradient; a process alone takes the batches and masks of two ranks, joined."""
    real_sample, world, generators = data.Table.sample, os.environ["WORLD_SIZE"], []
    def sample(self, split, size, generator):
        if size != 4:
            return real_sample(self, split, size, generator)
        generators[:] = [step_generator(0, 0, rank) for rank in (0, 1)]
        return torch.cat([real_sample(self, split, size, g) for g in generators])
    def objective(batch, args, generator, step=None, case=None):
        return in_parts(batch, args, [generator] if case else generators, step, case)
    def clip(parameters, limit, error_if_nonfinite):
        torch.save([p.grad for p in parameters], f"{argv[-1]}/gradient{world}")
        return torch.tensor(1.0)
    if world == "1":
        data.Table.sample, train_mlm.objective = sample, objective
    torch.nn.utils.clip_grad_norm_ = clip
    train_mlm.main(argv)


@slow
def test_a_nan_on_one_rank_stops_both(toy_csv, tmp_path):
    code = ("import sys, test_all, train_mlm; train_mlm.sum_losses = test_all.nan_loss(3, rank='1'); "
            "train_mlm.main(sys.argv[1:])")
    start = time.time()
    run = torchrun("-c", code, *SMALL, "--data", toy_csv, "--out_dir", tmp_path)
    assert run.returncode != 0 and "rank 1: the gradient norm is not finite" in run.stderr
    assert "rank 0: the gradient norm is not finite" in run.stderr and time.time() - start < 60
    assert saved(tmp_path)["step"] == 2


@slow
def test_two_processes_have_the_gradient_of_one_with_both_batches(toy_csv, tmp_path):
    code = "import sys, test_all; test_all.save_gradient(sys.argv[1:])"
    flags = [*SMALL, "--max_steps", 1, "--data", toy_csv, "--out_dir", tmp_path]
    for world in (1, 2):
        run = torchrun("-c", code, *flags, world=world)
        assert run.returncode == 0, run.stderr
    one, two = (torch.load(tmp_path / f"gradient{world}") for world in (1, 2))
    assert max(g.abs().max() for g in one) > 1e-3
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@slow
def test_two_million_rows_fit(tmp_path):
    """2,000,000 rows x 30 columns, T 1024: resident memory below three times the float32 table plus 1 GiB."""
    big = np.random.default_rng(0).standard_normal((2_000_000, 30), dtype=np.float32).round(3)
    pd.DataFrame(big).to_csv(tmp_path / "big.csv", index=False)
    code = ("import resource, sys, train_mlm; train_mlm.main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)")
    flags = "--seq_len 1024 --batch_size 14 --max_steps 2 --split 1990000 5000 5000".split()
    run = python("-c", code, "--data", tmp_path / "big.csv", *flags, "--out_dir", tmp_path)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) < 3 * 2_000_000 * 30 * 4 + 2 ** 30


# -----------------------------------------------------------------------------
# the zoo: 27 ways to a NaN, or to a wrong number; the naive form beside ours

ZOO = {}


def way(number, what, thread, naive, ours="finite"):
    """The function below returns what the naive form gives and what ours gives, each as stated here."""
    return lambda function: ZOO.update({number: (what, thread, naive, ours, function)})


def honest(column, rate=0.5):
    """A column of a file, through all of the shipped path: its masked loss, and its largest gradient."""
    table = table_of({"x": column}, "--seq_len 8")
    net = model.TableTransformer(model.Config(1, [], 0, 8, 1, 2, 16))
    loss = mean_losses(net, *ask(table.batch(table.starts("train", 8)), case=(rate, 1))).sum()
    loss.backward()
    return loss, max(p.grad.abs().max() for p in net.parameters() if p.grad is not None)


@functools.cache
def poisoned():
    """A run whose fourth training step has a NaN for its loss: the exit code, and the weights it leaves."""
    with tempfile.TemporaryDirectory() as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_mlm, "sum_losses", nan_loss(4))
        toy().to_csv(f"{out}/toy.csv", index=False)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
                pytest.raises(SystemExit) as stopped:
            train(f"{out}/toy.csv", out, "--max_steps 8")
        return stopped.value.code, list(saved(out)["model"].values())


HOLES = [1.0, NAN, 3.0, 2.0, NAN, 1.5] * 10


@way(1, "a NaN among the targets", "WenjieDu/PyPOTS#232", NAN)
def _():
    return F.mse_loss(torch.zeros(2), torch.tensor([0.0, NAN])), honest(HOLES)[0]


@way(2, "multiplied by a mask of 0", "ecmwf/WeatherGenerator#2723", NAN)
def _():
    square, mask = torch.tensor([1.0, NAN]) ** 2, torch.tensor([1.0, 0.0])
    return (square * mask).sum(), honest(HOLES)[0]


@way(3, "cells chosen after the loss: the gradient", "pytorch/pytorch#121416", NAN)
def _():
    p, y = torch.zeros(2, requires_grad=True), torch.tensor([0.0, NAN])
    F.mse_loss(p, y, reduction="none")[~y.isnan()].sum().backward()
    return p.grad.sum(), honest(HOLES)[1]


@way(4, "the mean of no cells", "pytorch/pytorch#50224", NAN, 0.0)
def _():
    return F.mse_loss(torch.zeros(0), torch.zeros(0)), honest(HOLES, rate=1e-9)[0]


@way(5, "cross-entropy where every target is ignored", "pytorch/pytorch#116349", NAN, 0.0)
def _():
    inputs, targets = ask(random_batch())
    ours = mean_losses(random_model(), inputs, targets._replace(score=torch.zeros_like(inputs.known)))
    return F.cross_entropy(torch.zeros(3, 5), torch.full((3,), -100)), ours[1]


@way(6, "a constant for \"nothing masked\"", "neuro-ml/deep_pipe#75", "error", 0.0)
def _():
    with pytest.raises(RuntimeError):
        torch.tensor(0.0).backward()
    return "error", honest(HOLES, rate=1e-9)[1]


@way(7, "NaN cast to an id", "pytorch/pytorch#154724", -2.0 ** 63, 0.0)
def _():
    return torch.tensor([NAN]).long(), table_of({"c": ["a", "b", None, "a"] * 10}).categorical[2]


@way(8, "a constant column divided by its spread", "tslearn-team/tslearn#52", NAN, 0.0)
def _():
    column = pd.Series([7.0] * 5)
    center, scale = data.fit_scale(column.to_numpy(), "standard")
    return ((column - column.mean()) / column.std())[0], (column[0] - center) / scale


@way(9, "window statistics over no cell", "thuml/Time-Series-Library#356", NAN, 1.0)
def _():
    x, known = torch.ones(1, 8, 1), torch.zeros(1, 8, 1, dtype=torch.bool)
    return x[known].mean(), model.window_scale(x, known)[1]


@way(10, "a sentinel cast to float32", "scverse/anndata#722", -math.inf, 0.0)
def _():
    naive = torch.tensor(-1.18e42, dtype=torch.float64).float()
    return naive, table_of({"x": [-1.18e42, *range(30)]}).numeric[0]


@way(11, "min(1.0, NaN) for the best loss", "Lightning-AI/pytorch-lightning#2636", 1.0, "stopped")
def _():
    return min(1.0, NAN), "stopped" if poisoned()[0] == 1 else "went on"


@way(12, "a softmax in which nothing may be looked at", "pytorch/pytorch#41508", NAN)
def _():
    x, valid = torch.ones(1, 1, 3, 2), torch.zeros(1, 3, dtype=torch.bool)
    naive = torch.full((3, 3), -math.inf).softmax(-1) @ x
    return naive.sum(), model.plain_attention(x, x, x, masking.create_attention_mask(valid, False)).sum()


@way(13, "a NaN under a masked key: 0 x NaN", "pytorch/pytorch#101967", NAN)
def _():
    table, x = table_of({"x": HOLES}), torch.tensor(HOLES[:8])[None, None, :, None]
    attend, ours = table.observed[None, None, :8, 0], table.numeric[None, None, :8]
    return (model.plain_attention(x * 0, x * 0, x, attend).sum(),
            model.plain_attention(ours, ours, ours, attend).sum())


@way(14, "finfo.min for -inf: the mean of what is forbidden", "NVIDIA/apex#1390", 2.0, 1.0)
def _():
    v, zero = torch.tensor([1.0, 2.0, 3.0])[None, None, :, None], torch.zeros(1, 1, 3, 1)
    naive = torch.full((3, 3), torch.finfo(torch.float32).min).softmax(-1) @ v
    nobody = masking.create_attention_mask(torch.zeros(1, 3, dtype=torch.bool), True)
    return naive[0, 0, 0], model.plain_attention(zero, zero, v, nobody)[0, 0, 0]        # row 0 sees itself


@way(15, "causal, and padding on the left", "pytorch/pytorch#110213", NAN)
def _():
    x, valid = torch.ones(1, 1, 3, 2), torch.tensor([[False, False, True]])
    naive = masking.causal_mask(3) & masking.padding_mask(valid)
    return (model.plain_attention(x, x, x, naive).sum(),
            model.plain_attention(x, x, x, masking.create_attention_mask(valid, True)).sum())


@way(16, "attn_mask together with is_causal", "jingyaogong/minimind#382", "error")
def _():
    x, mask, batch = torch.ones(1, 1, 3, 2), torch.ones(3, 3).bool(), random_batch()
    math_kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math_kernel, pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(x, x, x, mask, is_causal=True)
    batch.valid[:, 8:] = False
    inputs = create_inputs(tidy(batch), causal=True)
    return "error", NAN if inputs.attend is not None else random_model(causal=True)(inputs).numeric.sum()


@way(17, "heads for rows: does row 5 depend on row 0?", "kyegomez/FlashMHA#1", "no", "yes")
def _():
    right = F.scaled_dot_product_attention
    return ["yes" if model.find_leaks(True, axis)[5, 0] else "no" for axis in (model.over_heads, right)]


@way(18, "where(x > 0, sqrt(x), 0) at 0: the gradient", "pytorch/pytorch#68425", NAN)
def _():
    x, window = torch.zeros(1, requires_grad=True), torch.ones(1, 8, 1, requires_grad=True)
    torch.where(x > 0, x.sqrt(), 0.0).sum().backward()
    model.window_scale(window, torch.ones(1, 8, 1, dtype=torch.bool))[1].sum().backward()
    return x.grad, window.grad.sum()


@way(19, "the root of a squared error of 0: the gradient", "pytorch/pytorch#2421", NAN, 0.0)
def _():
    x, y = torch.zeros(1, 1, 1, requires_grad=True), torch.zeros(1, 1, 1, requires_grad=True)
    F.mse_loss(x, torch.zeros(1, 1, 1)).sqrt().backward()
    targets = masking.Targets(torch.zeros(1, 1, 1), torch.zeros(1, 1, 0).long(), torch.ones(1, 1, 1).bool())
    model.sum_losses(model.Prediction(y, []), targets, UNIT[:1]).sum().backward()
    return x.grad, y.grad


@way(20, "-1e9 for a mask in float16", "NVIDIA/apex#93", -math.inf)
def _():
    x, valid = torch.ones(1, 1, 3, 2).half(), torch.zeros(1, 3, dtype=torch.bool)
    ours = F.scaled_dot_product_attention(x, x, x, masking.create_attention_mask(valid, False))
    return torch.tensor(-1e9).half(), ours.float().sum()


@way(21, "a small gradient in float16 without a GradScaler", "locuslab/ect#13", 0.0, 1e-8)
def _():
    grads = []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu")):
        w = torch.ones(1, requires_grad=True)
        scaler.scale((w.half() * torch.tensor(1e-4).half()).float() * 1e-4).sum().backward()
        grads.append(w.grad / scaler.get_scale())
    return grads


@way(22, "LayerNorm of 1e20", "pytorch/pytorch#178123", NAN)
def _():
    naive, ours = torch.tensor([1e20, -1e20, 3e20, 2e20]), table_of({"x": [1e20, -1e20, *range(30)]}).numeric
    return F.layer_norm(naive, (4,)).sum(), F.layer_norm(ours[:4, 0], (4,)).sum()


@way(23, "full learning rate from step 0", "y0ast/Glow-PyTorch#1", NAN)
def _():
    ends, args = [], mlm_args("--lr 0.05 --max_steps 300 --warmup_steps 20")
    for careful in (False, True):
        x = torch.tensor([10.0], requires_grad=True)
        for step in range(300):
            gradient, = torch.autograd.grad((x ** 4 - x ** 2).sum(), x)
            if careful:                                     # warmup, and a norm of 1 at most
                gradient = gradient.clamp(-1, 1) * train_mlm.get_lr(step, args) / 0.05
            x = (x - 0.05 * gradient).detach().requires_grad_()
        ends.append(x.detach())
    return ends


@way(24, "clipping by a norm of NaN: share of gradients lost", "pytorch/pytorch#46849", 1.0, 0.0)
def _():
    p = [torch.nn.Parameter(torch.ones(2)) for _ in range(4)]
    for x, g in zip(p, (1.0, NAN, 1.0, 1.0)):
        x.grad = torch.full((2,), g)
    torch.nn.utils.clip_grad_norm_(p, 1.0)
    lost = [x.isnan().any() for x in poisoned()[1]]
    return sum(x.grad.isnan().any() for x in p) / len(p), sum(lost) / len(lost)


@way(25, "Adam after one NaN", "Trusted-AI/adversarial-robustness-toolbox#910", NAN)
def _():
    x = torch.nn.Parameter(torch.ones(1))
    adam = torch.optim.Adam([x])
    for gradient in (1.0, NAN, 1.0, 1.0, 1.0):
        x.grad = torch.tensor([gradient])
        adam.step()
    return x.detach(), sum(w.sum() for w in poisoned()[1])


@way(26, "nan_to_num on activations: the weights after a step", "pytorch/pytorch#94700", NAN)
def _():
    x, w = torch.tensor([[1.0, NAN]]), torch.nn.Parameter(torch.ones(2, 1))
    loss = (torch.nan_to_num(x @ w) - 1).square().sum()     # finite, for ever
    assert torch.isfinite(loss)
    loss.backward()
    code = "".join((ROOT / name).read_text() for name in ("model.py", "masking.py", "train_mlm.py"))
    return (w - 0.1 * w.grad).sum().detach(), NAN if "nan_to_num" in code else honest(HOLES)[1]


@way(27, "one rank stops alone", "Lightning-AI/pytorch-lightning#5243", "the others hang", "all stop")
def _():
    pytest.skip("takes two processes: see test_a_nan_on_one_rank_stops_both, under NANOTAB_SLOW=1")


def show_way(number):
    """(what naive gives, what ours gives) as plain numbers or words."""
    return [x.detach().sum().item() if isinstance(x, torch.Tensor) else x for x in ZOO[number][-1]()]


@pytest.mark.parametrize("number", ZOO)
def test_way_to_a_nan(number):
    _, _, naive, ours, _ = ZOO[number]
    theirs, own = show_way(number)
    assert theirs == naive or theirs != theirs and naive != naive               # NaN is not even itself
    assert math.isfinite(own) if ours == "finite" else own == ours or abs(own - ours) < 1e-3 * abs(ours)


def zoo():
    """python test_all.py zoo: the naive form of each way beside ours, and where users met it."""
    print(f"{'':4}{'way to a NaN':<56}{'naive':>12}{'ours':>12}   met in")
    for number, (what, thread, *_) in ZOO.items():
        try:
            values = "".join(f"{x if isinstance(x, str) else format(x, '.3g'):>12}" for x in show_way(number))
        except pytest.skip.Exception as reason:
            values = f"{'skipped':>24}"
            thread = f"{thread}; {reason}"
        print(f"{number:>2}  {what:<56}{values}   {thread}")


if __name__ == "__main__":
    if sys.argv[1:] != ["zoo"]:
        sys.exit("python test_all.py zoo, or: python -m pytest test_all.py")
    zoo()
