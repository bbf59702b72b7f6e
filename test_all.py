"""
Every promise of this repository, executable.

    python test_all.py zoo                          # 27 ways to a NaN, the naive form beside ours
    python -m pytest test_all.py                    # under a minute and a half on two cores
    NANOTAB_SLOW=1 python -m pytest test_all.py     # also what is slow
    ETTH1=ETTh1.csv python -m pytest test_all.py    # also the published protocol on a real table

Where a test guards against a well-known mistake it runs the mistake too, and shows that it fails.
"""
import contextlib
import dataclasses
import difflib
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
from masking import create_inputs, create_masks, pencil_in

NAN = math.nan
UNIT = torch.tensor([1.0, 0.5, 2.0])
ROOT = Path(__file__).parent
slow = pytest.mark.skipif(not os.environ.get("NANOTAB_SLOW"), reason="slow: set NANOTAB_SLOW=1")
etth1 = pytest.mark.skipif(not os.environ.get("ETTH1"), reason="set ETTH1 to the path of ETTh1.csv")
SMALL = ("--n_layer 1 --n_head 2 --n_embd 16 --batch_size 4 --seq_len 16 --max_steps 4 --eval_every 2 "
         "--log_every 1 --warmup_steps 2 --device cpu").split()
AHEAD = "--given 4 --horizons 1 3".split()                  # fits into the 16 rows of SMALL
EIGHT = "--max_steps 8 --dropout 0.1"
LEARN = "--seq_len 32 --n_embd 32 --lr 3e-3"                # enough to learn something in seconds
FACTS = {"script", "data", "steps", "seconds", "n_params", "seed", "test"}      # in every results.json
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
mlm_args = functools.partial(parsed, train_mlm.get_parser())
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


def same_bits(out, other):
    a, b = saved(out)["model"], saved(other)["model"]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def tidy(batch):
    """The Batch as data.py would have it: nothing is observed in padding, and what is not observed is 0."""
    N, real = batch.numeric.shape[-1], batch.valid[..., None]
    observed = batch.observed & real
    return Batch(batch.numeric * observed[..., :N], batch.categorical * observed[..., N:], observed,
                 batch.valid, batch.clock * real)


def random_batch(B=4, T=12, N=3, K=2, missing=0.2, seed=0):
    """A Batch with ids 2..4 and a few [UNK]."""
    g = torch.Generator().manual_seed(seed)
    observed = torch.rand(B, T, N + K, generator=g) > missing
    ids = torch.randint(1, 5, (B, T, K), generator=g)
    return tidy(Batch(torch.randn(B, T, N, generator=g), ids, observed, torch.ones(B, T).bool(),
                      torch.randn(B, T, 4, generator=g)))


def random_model(N=3, K=2, causal=False):
    """A small model whose head is not zero, so that what reaches it reaches the output."""
    torch.manual_seed(0)
    net = model.TableTransformer(model.Config(N, [5] * K, 4, 12, 2, 2, 16, causal=causal))
    torch.nn.init.normal_(net.head.weight)
    return net


def ask(batch, *flags, case=None):
    """What train_mlm makes of a batch in its first step, or in a case of evaluation: Inputs and Targets."""
    return train_mlm.objective(batch, mlm_args(*flags), step_generator(1), step=0, case=case)


def flat(guess):
    """Numbers and logits side by side: (B, T, N + all classes)."""
    return torch.cat([guess.numeric, *guess.logits], dim=-1)


def mean_losses(net, inputs, targets, dtype=torch.float32):
    """The numeric and the categorical loss of a step, (2,), as the loop forms them."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        guess = net(inputs)
    sums = model.sum_losses(guess, targets, UNIT[:inputs.numeric.shape[-1]])
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
    assert table.facts["a"][0] == 8
    assert table.schema.scale[table.schema.numeric.index("const")] == 1.0       # naive: 8 and 10 of the zoo


def test_schema_sees_train_rows_only():
    changed = toy()
    changed.loc[280:, ["wave", "mirror", "sign"]] = 1e6, 1e6, "sideways"
    a, b = (table_of(frame, "--split 0.7 0.15 0.15") for frame in (toy(), changed))
    assert a.schema == b.schema
    everything = [data.fit_scale(frame["wave"].to_numpy(), "standard") for frame in (toy(), changed)]
    assert everything[0] != everything[1]                   # naive: statistics over all rows see the change
    assert (b.categorical[280:] == data.UNK_ID).sum() == 120 and not (a.categorical == data.UNK_ID).any()
    assert b.numeric.abs().max() == 10                                          # clipped


def test_schema_survives_a_checkpoint_and_decodes(tmp_path):
    table = table_of(toy(), "--seq_len 16")
    torch.save(dataclasses.asdict(table.schema), tmp_path / "schema.pt")
    schema = data.Schema(**torch.load(tmp_path / "schema.pt", weights_only=True))
    assert schema == table.schema
    decoded = schema.decode(table.numeric, table.categorical.long())
    for name, column in toy().drop(columns="date").items():
        ours, here = pd.Series(decoded[name], name=name), column.notna()
        pd.testing.assert_series_equal(ours[here], column[here], check_dtype=False, rtol=1e-5, atol=1e-5)
    assert all(x is None for x in decoded["sign"][~here])
    schema.vocabulary[0] = []                               # no value in train, and yet it is guessed as id 2
    assert schema.decode(table.numeric[:1], torch.tensor([[2]]))["sign"] == [None]


@pytest.mark.parametrize("day,thousand,options", [
    ("%d.%m.%Y", "", "sep=; decimal=,"), ("%Y-%m-%d", "1.0", "sep=; decimal=, thousands=."),
    ("%d.%m.%Y", "1.0", "sep=; decimal=, thousands=. parse_dates=['Datum'] dayfirst=True")])
def test_a_file_with_decimal_commas_and_a_word(day, thousand, options, tmp_path):
    path, days = tmp_path / "comma.csv", pd.date_range("2024-03-01", periods=30).strftime(day)
    values = ["Ausfall" if i == 3 else f"{thousand}{i + 10},5" for i in range(30)]
    path.write_text("Datum;Last\n" + "".join(f"{d};{x}\n" for d, x in zip(days, values)))
    table = load_table(data_args("--seq_len 4 --data", path, "--read_csv", shlex.quote(options)))
    assert table.kinds == {"Datum": "time", "Last": "numeric"}
    assert table.facts["Last"][0] == 1 and table.facts["Last"][4] == (1039.5 if thousand else 39.5)
    assert table.facts["Datum"][1] == pd.Timestamp("2024-03-30")


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
    table = table_of(frame, "--group_col well --seq_len 20 --scaler none --clip 1e9")
    rows = {split: set() for split in ("train", "val", "test")}
    for split in rows:
        for windows in (table.starts(split, 7), table.sample(split, 200, step_generator(1))):
            batch = table.batch(windows)
            own = (batch.numeric + torch.tensor(table.schema.center) * batch.observed).round()  # own units
            for numeric, observed, real in zip(own, batch.observed, batch.valid):
                assert numeric[real, 1].unique().numel() == 1                   # one group
                assert (numeric[real, 0].diff() == 1).all()                     # rows in order, none skipped
                assert real.sum() == min(20, lengths[int(numeric[0, 1])]) and real[:real.sum()].all()
                assert not observed[~real].any() and (numeric[~real] == 0).all()
                rows[split] |= set(numeric[real, 0].tolist())
    assert sum(map(len, rows.values())) == sum(lengths) == len(set.union(*rows.values()))


def test_of_a_few_groups_each_part_gets_one():
    for split in ("0.7 0.15 0.15", "0.4 0.1 0.1", "0.98 0.01 0.01"):
        for n in (3, 4, 5):
            assert min(data.split_counts(n, "groups", data_args("--split", split))) >= 1


def test_time_sorts_rows_and_becomes_a_clock():
    table = table_of(toy().sample(frac=1, random_state=0))
    assert torch.equal(table.numeric, table_of(toy()).numeric)
    clock = table.clock                                     # of 16 days: the day is a cycle, the year not yet
    assert clock.shape == (400, 2)
    torch.testing.assert_close(clock[:24], clock[24:48], atol=1e-5, rtol=0)
    quarters = torch.tensor([[0.0, 1], [1, 0], [0, -1], [-1, 0]])
    torch.testing.assert_close(clock[[0, 6, 12, 18]], quarters, atol=1e-5, rtol=0)
    long = {"date": pd.date_range("2020-01-01", periods=1500, freq="D"), "x": np.arange(1500.0)}
    assert table_of(long).clock.shape == (1500, 4)


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


def test_simulated_planets_obey_the_laws():
    here, mass, axis, eccentricity, x, v, rows = data.simulate_systems(1000)
    m = np.concatenate([np.ones((1, 1000)), mass])
    total = np.stack([data.energy(*moment, m) for moment in zip(x, v)])         # (59, systems)
    assert np.abs(total / total[0] - 1)[np.arange(59)[:, None] < rows].max() < 1e-6
    # naive: the same number of force evaluations, 48, spent on plain leapfrog
    a, b = x[0], v[0]
    for _ in range(48):
        a = a + 0.5 / 96 * b
        b = b + 0.5 / 48 * data.gravity(a, m)
        a = a + 0.5 / 96 * b
    ours, naive = [z[1] for z in data.integrate(x[0], v[0], m, np.full(1000, 0.5), 2)], (a, b)
    ours, naive = (np.median(np.abs(data.energy(*moment, m) - total[0])) for moment in (ours, naive))
    assert naive > 20 * ours
    # Kepler's third law: one planet comes round after 2 pi sqrt(a^3 / (1 + m))
    a, e, m = np.array([1.0, 1.7, 3.0]), np.array([0.0, 0.1, 0.05]), np.array([[1.0] * 3, [5e-5] * 3])
    x, v = np.zeros((2, 2, 3)), np.zeros((2, 2, 3))
    x[0, 1], v[1, 1] = a * (1 - e), np.sqrt((1 + 5e-5) * (1 + e) / (1 - e) / a)
    period = 2 * np.pi * np.sqrt(a ** 3 / (1 + 5e-5))
    x, _ = data.integrate(x, v, m, period / 50, 60)
    angle = np.unwrap(np.arctan2(*(x[:, ::-1, 1] - x[:, ::-1, 0]).transpose(1, 0, 2)), axis=0)
    for k in range(3):
        assert np.interp(2 * np.pi, angle[:, k], np.arange(60)) == pytest.approx(50, rel=1e-3)


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
    x = table.filter(regex="planet._x").sum(axis=1)
    assert (table["acceleration_x"] == np.where(x > 0, "increasing", "decreasing")).all()
    assert table["total_mass"].values == pytest.approx(table.filter(regex="planet._m").sum(axis=1).values)
    assert table_of(table, "--data planets").segments["train"].shape == (210, 2)


# -----------------------------------------------------------------------------
# masking.py: what is hidden

@pytest.mark.parametrize("style", ["cell", "span"])
@pytest.mark.parametrize("rate", [0.05, 0.25, 0.5])
def test_rate_and_runs_of_hidden_cells(style, rate):
    hidden = create_masks(torch.ones(256, 200, 10).bool(), rate, step_generator(1), style, span=12)
    assert hidden.float().mean() == pytest.approx(rate, abs=0.012)
    assert hidden[:, 0].float().mean() == pytest.approx(rate, abs=0.06)        # the first row like any other
    runs = (hidden[:, 1:] & ~hidden[:, :-1]).sum() + hidden[:, 0].sum()
    mean = 12 if style == "span" else 1 / (1 - rate)
    expected = 200 / (1 + 199 / mean)                       # the window cuts some runs short
    assert hidden.sum() / runs == pytest.approx(expected, rel=0.1)


def test_missing_cells_are_never_hidden_the_naive_form_hides_them():
    x = torch.tensor([[1.0, float("nan"), 3.0]])
    assert ((torch.rand(x.shape) < 1) & (x != 0)).all()                         # naive: NaN != pad is True
    batch = random_batch()
    for style in ("cell", "span"):
        answerable = masking.scorable(batch.observed, batch.categorical)
        hidden = create_masks(answerable, 0.9, step_generator(0), style)
        assert not (hidden & ~batch.observed).any() and not hidden[..., 3:][batch.categorical == 1].any()


def test_one_rate_a_window_and_spans_too_short_for_their_rate():
    rates = torch.tensor([0.1, 0.6])[:, None, None]
    for style in ("cell", "span"):
        hidden = create_masks(torch.ones(2, 4000, 5).bool(), rates, step_generator(0), style, span=6)
        torch.testing.assert_close(hidden.float().mean((1, 2)), rates[:, 0, 0], atol=0.03, rtol=0)
    with pytest.raises(ValueError, match="cannot hide"):
        create_masks(torch.ones(1, 9, 1).bool(), 0.6, step_generator(0), "span", span=2)


def test_80_10_10_and_the_two_draws_that_miss_it():
    batch = random_batch(64, 400, missing=0.1)
    hidden = create_masks(batch.observed, 0.5, step_generator(0))
    unique = torch.arange(64 * 400 * 3).view(64, 400, 3).float()                # every cell its own value
    numeric, _, shown = masking.bert_style_masking(unique, *batch[1:3], hidden, step_generator(1))
    masked, random = hidden & ~shown, (hidden & shown)[..., :3] & (numeric != unique)
    for kind in (slice(3), slice(3, None)):
        assert masked[..., kind].sum() / hidden[..., kind].sum() == pytest.approx(0.8, abs=0.012)
    for share in (random, (hidden & shown)[..., :3] & (numeric == unique)):     # another value, or its own
        assert share.sum() / hidden[..., :3].sum() == pytest.approx(0.1, abs=0.012)
    assert torch.equal(numeric[~random], unique[~random])                       # nothing else is touched
    assert torch.equal(shown[~hidden], batch.observed[~hidden])
    # naive: 80 % masked, and half of ALL cells that a second draw picks from the rest and its leftovers
    g = torch.Generator().manual_seed(0)
    first, second = torch.rand(10**6, generator=g), torch.rand(10**6, generator=g)
    naive_random = (first >= 0.8) & (second < 0.1)                              # meant as 10 % of all, is 2 %
    assert abs(naive_random.float().mean() - 0.1) > 0.05


def test_donors_come_from_the_same_column_and_are_known():
    batch = random_batch(8, 30, missing=0.3)
    column = torch.tensor([100.0, 200.0, 300.0]).expand(8, 30, 3)               # the value names its column
    named = torch.tensor([5, 7]).expand(8, 30, 2)                               # and so does the id, but
    given = torch.where(batch.categorical < 2, batch.categorical, named)        # for [MASK] and [UNK]
    hidden = create_masks(batch.observed, 0.5, step_generator(0))
    marked = torch.where(hidden[..., :3] | ~batch.observed[..., :3], -1.0, column)  # -1: may not be lent
    def all_random(hidden):
        return masking.bert_style_masking(marked, given, batch.observed, hidden, step_generator(1), 0.0, 1.0)
    numeric, ids, _ = all_random(hidden)
    assert torch.equal(numeric[hidden[..., :3]], column[hidden[..., :3]])
    assert torch.equal(ids[hidden[..., 3:]], named[hidden[..., 3:]])            # never [MASK], never [UNK]
    assert not all_random(batch.observed)[2].any()                              # no donors: shown as [MASK]


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
    assert masking.mix_up(batch, 0.0, None) is batch


def test_schedule_hits_both_ends():
    p = masking.get_mask_probability
    for end, steps in ((0.05, [(0, 60), (-5, 60), (0, 0), (0, 1)]), (0.25, [(59, 60), (1000, 60), (1, 1)])):
        assert [p(*step, 0.05, 0.25) for step in steps] == [end] * len(steps)
    rates = [p(s, 60, 0.05, 0.25) for s in range(60)]
    assert np.allclose(np.diff(rates), 0.2 / 59)
    assert 0.05 + 0.2 * 59 / 60 < 0.25  # naive epoch / total never arrives


# -----------------------------------------------------------------------------
# masking.py: what is pencilled in, who may look

def test_pencil_is_what_pandas_would_write():
    g = torch.Generator().manual_seed(0)
    numeric, known = torch.randn(6, 40, 5, generator=g), torch.rand(6, 40, 5, generator=g) < 0.3
    known[0, :, 0] = False                                  # nothing to go by: 0
    both, causal = pencil_in(numeric, known, False), pencil_in(numeric, known, True)
    for b in range(6):
        frame = pd.DataFrame(numeric[b].double().numpy()).where(known[b].numpy())
        interpolated = frame.interpolate(limit_direction="both").fillna(0)
        np.testing.assert_allclose(both[b], interpolated, atol=1e-6)
        np.testing.assert_array_equal(causal[b], frame.ffill().fillna(0))
    assert torch.equal(both[known], numeric[known])
    ids = torch.tensor([2, 0, 0, 0, 3, 0, 0])[None, :, None]                    # of two as near the earlier
    assert masking.pencil_category(ids, ids > 0, False).flatten().tolist() == [2, 2, 2, 3, 3, 3, 3]
    assert masking.pencil_category(ids, ids > 0, True).flatten().tolist() == [2, 2, 2, 2, 3, 3, 3]


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
    x, (cos, sin) = torch.randn(2, 20, 32, dtype=dtype), model.rotary_table(20, 8)
    out = block(x, attend, cos, sin)
    qkv = block.qkv(x).view(2, 20, 3, 4, 8).float()
    qkv = torch.cat([model.rotate(qkv[:, :, :2], cos, sin), qkv[:, :, 2:]], dim=2)
    y = model.plain_attention(*qkv.transpose(1, 3).unbind(dim=2), full)
    y = block.proj(y.transpose(1, 2).reshape(2, 20, 32).to(dtype))
    torch.testing.assert_close(out[valid], y[valid], atol=tolerance, rtol=tolerance)


def test_rotary_attention_depends_on_distance_alone():
    cos, sin = model.rotary_table(30, 8)
    q, k = torch.randn(2, 8).double().unbind(0)
    turn = lambda x, row: model.rotate(x.view(1, 1, 1, 1, 8), cos[row, None], sin[row, None]).flatten()
    for row in (5, 20):
        assert torch.allclose(turn(q, 3) @ turn(k, 0), turn(q, row + 3) @ turn(k, row), atol=1e-5)


def test_who_sees_whom():
    assert model.find_leaks(causal=False).all()             # masked: past and future
    causal = model.find_leaks(causal=True)                  # naive, over heads: way 17 of the zoo
    assert torch.equal(causal, torch.ones(12, 12).tril().bool())
    inputs, _ = ask(random_batch(missing=0), case=("cell", 0.5))                # and other columns
    numeric = inputs.numeric.clone().requires_grad_()
    said = random_model()(inputs._replace(numeric=numeric)).numeric[0, 4, 0]
    gradient, = torch.autograd.grad(said, numeric)
    assert (gradient[0, inputs.known[0, :, 1], 1] != 0).all()


@pytest.mark.parametrize("flags", ["", "--mask_share 0.8 --random_share 0.1"])
def test_the_truth_under_a_mask_reaches_no_output(flags):
    batch, net = random_batch(), random_model()
    inputs, targets = ask(batch, flags)
    covered = targets.score & ~inputs.shown                                     # shown as [MASK]
    assert covered[..., :3].any() and covered[..., 3:].any()
    assert (targets.score & inputs.shown).any() == bool(flags)                  # random and kept cells:
    truth = batch.observed & ~targets.score                                     # never taken for the truth
    assert torch.equal(inputs.known, truth)
    assert torch.equal(inputs.pencil, pencil_in(batch.numeric, truth[..., :3], causal=False))
    forged = batch._replace(numeric=torch.where(covered[..., :3], 1e3, batch.numeric),
                            categorical=torch.where(covered[..., 3:], 4, batch.categorical))
    other, _ = ask(forged, flags)
    assert torch.equal(inputs.pencil, other.pencil) and torch.equal(flat(net(inputs)), flat(net(other)))
    # naive: window statistics over all observed cells instead of the known ones
    leak = [net(i._replace(known=batch.observed)).numeric for i in (inputs, other)]
    assert not torch.equal(*leak)


@pytest.mark.parametrize("causal", [False, True])
def test_an_untrained_model_is_its_baseline(causal):
    batch = random_batch(T=30)
    net = model.TableTransformer(model.Config(3, [5, 5], 4, 30, 1, 2, 16, causal=causal))
    known = batch.observed & ~create_masks(batch.observed, 0.3, step_generator(0))
    inputs = create_inputs(batch, known, causal)
    guess = net(inputs)
    assert torch.equal(guess.numeric, inputs.pencil)
    # nothing to guess from, or [UNK]: the most frequent value
    assert torch.equal(guess.ids(), inputs.pencil_ids.clamp(min=2))


def outputs(net, batch, **changed):
    """What is said of the next rows of a batch."""
    inputs, _ = train_ar.objective(batch, ar_args(), step_generator(0))
    return flat(net(inputs._replace(**changed)))


def next_row_changed(batch, t):
    """The batch with everything another from row t on: numbers, ids, holes, clock, and where it ends."""
    other = random_batch(seed=9, missing=0.5)
    other.valid[:, t + 3:] = False
    return Batch(*(torch.cat([a[:, :t], b[:, t:]], dim=1) for a, b in zip(batch, tidy(other))))


def test_causal_outputs_never_depend_on_what_comes_after():
    batch, net = random_batch(missing=0.4), random_model(causal=True)
    batch.valid[1, 9:] = False                              # with padding, too
    batch = tidy(batch)
    for t in range(1, 12):
        forged = next_row_changed(batch, t)
        now, then = outputs(net, batch), outputs(net, forged)
        assert torch.equal(now[:, :t], then[:, :t])         # not by a bit
        assert (now[:, t] != then[:, t]).any(-1).all()
        # naive: what is pencilled in by interpolation, as masked modelling does, knows the future
        leaks = [outputs(net, b, pencil=pencil_in(b.numeric, b.observed[..., :3], causal=False))
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
    inputs, targets = train_ar.objective(batch, ar_args(), None, case="next row")
    assert torch.equal(targets.numeric[:, :-1], batch.numeric[:, 1:])
    assert torch.equal(targets.categorical[:, :-1], batch.categorical[:, 1:])
    assert torch.equal(targets.score[:, :-1], masking.scorable(batch.observed, batch.categorical)[:, 1:])
    assert not targets.score[:, -1].any() and torch.equal(inputs.shown, batch.observed)
    assert torch.equal(inputs.pencil, pencil_in(batch.numeric, batch.observed[..., :3], causal=True))


def test_rollout_equals_a_loop_written_out():
    """Histories of 1 to 12 rows, each on its own, unpadded, a row at a time, the last 12 looked at."""
    batch, net, steps = random_batch(B=6, missing=0.3), random_model(causal=True), 7
    length, clock = torch.tensor([1, 3, 5, 8, 11, 12]), torch.randn(6, steps, 4)
    batch.observed[2, :, 1] = False                         # a column without any value has no future either
    batch = tidy(batch._replace(valid=torch.arange(12) < length[:, None]))
    together = net.rollout(batch, clock, steps)
    for b in range(6):
        history = Batch(*(x[b:b + 1, :length[b]] for x in batch))
        ever = history.observed.any(1)[0]
        for s in range(steps):
            window = Batch(*(x[:, -12:] for x in history))
            with torch.no_grad():
                guess = net(create_inputs(window, window.observed, causal=True))
            row = Batch((guess.numeric[:, -1:] * ever[:3]),
                        torch.stack([x[:, -1:].argmax(-1) + 2 for x in guess.logits], -1) * ever[3:],
                        ever.expand(1, 1, 5), torch.ones(1, 1).bool(), clock[b:b + 1, s:s + 1])
            history = Batch(*(torch.cat(pair, dim=1) for pair in zip(history, row)))
        for ours, theirs in zip(together, history):
            torch.testing.assert_close(ours[b:b + 1], theirs[:, -steps:], atol=1e-5, rtol=1e-5)
    assert together.observed[5].any() and not together.observed[2, :, 1].any()


def test_baselines_roll_out_to_what_they_are():
    """Repetition stays, a line goes on, and a season repeats itself, when each goes on from its own words."""
    t = torch.arange(12.0)
    numeric = torch.stack([t, t * 0.5 - 1, torch.sin(t * torch.pi / 3)], dim=-1)[None]      # a period of 6
    batch = random_batch(B=1, missing=0)._replace(numeric=numeric)
    net, args = random_model(causal=True), ar_args("--season", "6")
    def ahead(name):
        clock = torch.zeros(1, 9, 4)
        return net.rollout(batch, clock, 9, lambda inputs: train_ar.baselines(inputs, args)[name]).numeric[0]
    t = torch.arange(12.0, 21.0)
    assert torch.equal(ahead("last"), numeric[0, -1].expand(9, 3))
    torch.testing.assert_close(ahead("linear")[:, :2], torch.stack([t, t * 0.5 - 1], -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(ahead("season")[:, 2], torch.sin(t * torch.pi / 3), atol=1e-5, rtol=0)


def test_padding_changes_nothing():
    padded, net = random_batch(B=1), random_model()
    hidden = create_masks(padded.observed, 0.3, step_generator(0))
    padded.valid[:, 8:] = False
    a, b = (flat(net(create_inputs(batch, batch.observed & ~hidden[:, :rows], causal=False)))
            for rows, batch in ((8, padded.rows(0, 8)), (12, tidy(padded))))
    torch.testing.assert_close(a, b[:, :8], atol=1e-5, rtol=1e-5)


def test_window_scale_stays_finite_and_calm():
    known = torch.tensor([True, False, True]).expand(1, 50, 3)
    center, scale = model.window_scale(torch.full((1, 50, 3), 3.0), known)
    # no known cell: the train column's own
    assert center.flatten().tolist() == [3, 0, 3] and scale[0, 0, 1] == 1
    assert (scale > 0.1).all()  # no spread: not divided by nothing


def test_unk_is_a_constant_zero():
    embed, ids, shown = random_model().embed, torch.ones(1, 12, 2).long(), torch.ones(1, 12, 5).bool()
    zero = embed(torch.zeros(1, 12, 3), ids, shown, torch.zeros(1, 12, 4))
    assert torch.equal(zero, embed.bias.expand(1, 12, 16))
    zero.sum().backward()
    assert embed.categories.weight.grad[0].abs().sum() == 0


HOSTILE = {
    "as it is": lambda b: None,
    "missing column": lambda b: b.observed[..., 0].fill_(False),
    "missing row": lambda b: b.observed[:, 3].fill_(False),
    "empty window": lambda b: b.observed[0].fill_(False),
    "nothing observed": lambda b: b.observed.fill_(False),
    "constant columns": lambda b: b.numeric.fill_(2.0),
    "one category": lambda b: b.categorical.fill_(2),
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
        loss = mean_losses(net, *ask(tidy(batch), case=("cell", rate)), dtype).sum()
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


def test_bfloat16_stays_near_float32():
    asked, found = ask(random_batch(B=16), case=("cell", 0.3)), []
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
    guess, chosen = net(inputs), targets.score[..., :3]
    ours, truth = (guess.numeric / UNIT)[chosen], (targets.numeric / UNIT)[chosen]
    entropies = [F.cross_entropy(logits[here], ids[here] - 2, reduction="none") for logits, ids, here in
                 zip(guess.logits, targets.categorical.unbind(-1), targets.score[..., 3:].unbind(-1))]
    expected = torch.stack([F.mse_loss(ours, truth), torch.cat(entropies).mean()])
    torch.testing.assert_close(mean_losses(net, inputs, targets), expected)
    huber = model.sum_losses(guess, targets, UNIT, "huber")[0]
    torch.testing.assert_close(huber, F.huber_loss(ours, truth, reduction="sum"))


# -----------------------------------------------------------------------------
# the loop

def test_loss_falls_and_beats_the_baselines(toy_csv, tmp_path):
    history = train(toy_csv, tmp_path, LEARN, "--n_layer 2 --batch_size 32 --max_steps 300 --eval_every 100",
                    pictures=True)
    assert history[-1]["val"] < 0.5 * history[0]["val"]
    found = results(tmp_path)
    assert set(found) == FACTS | {"eval_mask_probs"}
    errors = {name: np.array(means["mse"]) for name, means in found["test"]["cell"].items()}
    assert set(errors) == {"model", "mean", "last", "linear"} and len(errors["model"]) == 4
    ours = errors.pop("model")
    assert all((ours < 0.7 * theirs).all() for theirs in errors.values())       # at every rate
    assert len(pd.read_csv(tmp_path / "log.csv")) == len(history)
    assert all((tmp_path / name).stat().st_size > 5000 for name in PICTURES)


def test_same_seed_same_bits_and_evaluation_changes_nothing(finished, toy_csv, tmp_path):
    train(toy_csv, tmp_path, EIGHT, "--eval_every 1 --eval_stride 3")
    assert same_bits(finished, tmp_path)
    train(toy_csv, tmp_path, EIGHT, "--seed 1")
    assert not same_bits(finished, tmp_path)


def test_resume_ends_with_the_same_bits(finished, toy_csv, tmp_path, monkeypatch, capsys):
    real = train_mlm.learning_rate
    def stop_at_five(step, args):
        assert step < 5, "stop"
        return real(step, args)
    monkeypatch.setattr(train_mlm, "learning_rate", stop_at_five)
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
    capsys.readouterr()
    resume(tmp_path, "--max_steps 9 --weight_decay 0.5")
    assert "--max_steps 9 overrides 8" in capsys.readouterr().out
    assert saved(tmp_path)["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_a_non_finite_gradient_stops_before_the_step_and_says_why(finished, toy_csv, tmp_path, monkeypatch,
                                                                  capsys):
    models, seen = [], []
    def poisoned(batch, args, generator, step=None, case=None):
        inputs, targets = OBJECTIVE(batch, args, generator, step, case)
        if step == 3:                                       # a NaN in `mirror` that has slipped past the door
            b, t = (inputs.shown[..., 1] & inputs.known[..., 1]).nonzero()[0].tolist()
            inputs.numeric[b, t, 1] = NAN
            seen.append(batch.numeric[b, t, 1])
        return inputs, targets
    def keep(config):
        models.append(model.TableTransformer(config))
        return models[0]
    monkeypatch.setattr(train_mlm, "objective", poisoned)
    monkeypatch.setattr(train_mlm, "TableTransformer", keep)
    with pytest.raises(SystemExit) as stopped:
        train(toy_csv, tmp_path, EIGHT)
    message = capsys.readouterr().err
    for said in ("step 3", "mirror: up to inf", "first output not finite: embed", "embed.weight", "--resume"):
        assert said in message
    row = int(re.search(r"mirror: .* in row (\d+)", message)[1])
    assert load_table(data_args("--data", toy_csv)).numeric[row, 1] == seen[0]  # that very cell
    for x in (*models[0].parameters(), *saved(tmp_path)["model"].values()):     # in memory and on disk
        assert torch.isfinite(x).all()
    assert stopped.value.code == 1 and saved(tmp_path)["step"] == 3             # nothing of it is lost
    monkeypatch.undo()
    resume(tmp_path)
    assert same_bits(finished, tmp_path)


def test_the_first_module_that_breaks_is_found():
    batch, net = random_batch(), random_model()
    inputs = create_inputs(batch, batch.observed, False)
    assert model.first_non_finite(net, inputs) is None
    with torch.no_grad():
        net.blocks[1].mlp.fc.weight[0, 0] = math.inf
    assert model.first_non_finite(net, inputs) == "blocks.1.mlp.fc"


@pytest.mark.parametrize("when,last", [([4], 5), ([8, None], 8)])   # in a step, and in the last evaluation
def test_ctrl_c_saves_and_says_how_to_go_on(when, last, finished, toy_csv, tmp_path, monkeypatch, capsys):
    steps = []
    def press(batch, args, generator, step=None, case=None):
        steps.append(step)                                  # None: an evaluation
        if steps[-len(when):] == when:
            os.kill(os.getpid(), signal.SIGINT)
        return OBJECTIVE(batch, args, generator, step, case)
    monkeypatch.setattr(train_mlm, "objective", press)
    with pytest.raises(SystemExit) as stopped:
        train(toy_csv, tmp_path, EIGHT)
    said = capsys.readouterr().out.splitlines()[-1]
    assert stopped.value.code == 130 and f"--resume --out_dir {tmp_path}" in said
    assert saved(tmp_path)["step"] == last
    monkeypatch.undo()
    train_mlm.main(shlex.split(said.split(".py ")[1]))
    assert same_bits(finished, tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
    return [type(first)(*(None if x[0] is None else torch.cat(x) for x in zip(first, *others)))
            for first, *others in zip(*parts)]


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
    rates = [train_mlm.learning_rate(s, args) for s in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1 and rates[-1] == pytest.approx(0.1)
    assert train_mlm.learning_rate(0, mlm_args("--warmup_steps 0 --max_steps 1")) > 0


@pytest.mark.parametrize("flags", [
    "--mask_style span", "--mask_share 0.8 --random_share 0.1", "--mask_prob_start 0.05", "--mask_spread 0",
    "--mask_prob 0.95", "--mask_prob 0.6 --mask_style span", "--score observed",
    "--mask_style span --mask_span 1.2 --mask_prob 0.08 --eval_mask_probs 0.1", "--dtype bfloat16",
    "--loss huber --grad_accum 2 --grad_clip 0", "--dtype float16", "--scaler robust --seq_len 1",
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
    tops, bottoms = zip(*((ROOT / name).read_text().split("# ---- from here to the end") for name in SCRIPTS))
    assert bottoms[0] == bottoms[1] and bottoms[0].count("\n") > 300
    blocks = [top[top.index("# THE OBJECTIVE"):].splitlines() for top in tops]
    changed = [line for line in difflib.unified_diff(*blocks, n=0) if line[0] in "+-"][2:]
    assert len(changed) <= 80
    shown = re.findall(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert "".join(shown).splitlines() == changed           # the README prints all of it
    ours, theirs = vars(mlm_args()), vars(ar_args())        # flags and defaults, in the order of --help
    assert [name for name in ours if name in theirs] == [name for name in theirs if name in ours]
    for name in ours.keys() & theirs.keys() - {"data", "out_dir", "max_steps", "category_weight"}:
        assert ours[name] == theirs[name], name


def test_autoregression_beats_its_baselines(tmp_path):
    toy(1000, noise=0.05).to_csv(tmp_path / "calm.csv", index=False)
    history = train(tmp_path / "calm.csv", tmp_path, LEARN, "--n_layer 2 --batch_size 32 --max_steps 200",
                    "--eval_every 100 --season 4 --given 16 --horizons 1 5 10",
                    script=train_ar, pictures=True)
    assert history[-1]["val"] < 0.7 * history[0]["val"]
    found = results(tmp_path)
    assert set(found) == FACTS | {"horizons"} and found["horizons"] == [1, 5, 10]
    ours = found["test"].pop("model")
    assert set(found["test"]) == {"last", "linear", "season"}
    for theirs in found["test"].values():
        assert set(theirs) == {"next_mse", "next_accuracy", "rollout_mse"}
        assert ours["next_mse"] < 0.8 * theirs["next_mse"]
        assert all(a < 0.8 * b for a, b in zip(ours["rollout_mse"][1:], theirs["rollout_mse"][1:]))
    assert all((tmp_path / name).stat().st_size > 5000 for name in PICTURES)


def test_a_roll_out_asks_for_test_rows_alone():
    frame, own_units = pd.DataFrame({"x": np.arange(300.0)}), "--scaler none --clip 1e9"
    table, one_group = table_of(frame, own_units), table_of(frame.assign(g="a"), own_units, "--group_col g")
    args = ar_args("--given 10 --horizons 19 --eval_stride 1")
    windows = train_ar.roll_out_windows(table, args)
    assert torch.equal(train_ar.roll_out_windows(one_group, args), windows)
    rows = table.batch(windows).rows(0, 29).numeric[..., 0] + table.schema.center[0]
    assert rows[:, 10:].min().round() == 255 and rows.max().round() == 299      # the test rows, all of them
    assert rows[0, 0].round() == 245                                            # naive starts: 159 to 204
    table = table_of(data.simulate_planets(60), "--data planets")
    windows = train_ar.roll_out_windows(table, ar_args())
    assert torch.equal(windows, table.segments["test"])                         # rows 0 to 9 of each system


def test_the_final_roll_out_takes_a_column_empty_in_train_and_no_dropout(tmp_path, monkeypatch):
    real, modes = train_ar.examine, []
    monkeypatch.setattr(train_ar, "examine", lambda net, *a: modes.append(net.training) or real(net, *a))
    toy().assign(late=[None] * 350 + ["p"] * 50).to_csv(tmp_path / "late.csv", index=False)
    train(tmp_path / "late.csv", tmp_path, "--dropout 0.5", script=train_ar)
    assert modes == [False] and (tmp_path / "results.json").exists()


def test_jitter_leaves_alone_what_does_not_move():
    numeric, known = torch.full((2, 8, 1), 3.0), torch.ones(2, 8, 1).bool()
    known[:, :2] = False                                    # the first known row has no step
    assert torch.equal(masking.jitter(numeric, known, 0.5, step_generator(0)), numeric)
    moving = numeric * torch.arange(8)[None, :, None]
    off = (masking.jitter(moving, known, 0.5, step_generator(0)) - moving) != 0
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
    (None, "no such file"), ("", "cannot read"), ("a,b\n", "no rows"), ("a,b\n1,2\n", "--split"),
    ("a;b\n1;2\n", "separator / --read_csv"), ("a;b\n1,5;2,5\n3,5;4,5\n", "separator"),
    ("date\n2024-01-01\n2024-01-02\n", "no usable column"),
    ("t,x\nUTC,m/s\n" + "".join(f"2024-01-{i},{i}\n" for i in range(10, 32)), "'t' / 'UTC' / skip")])
def test_a_bad_file_is_one_sentence(content, says, tmp_path, capsys):
    if content is not None:
        (tmp_path / "bad.csv").write_text(content)
    refused(lambda: train(tmp_path / "bad.csv", tmp_path / "out"), capsys, says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags,says", [
    ("--time_col sign", "--time_col sign"), ("--split inf 1 1", "--split"), ("--split nan 1 1", "--split"),
    ("--mask_style span --mask_prob_start 0.95", "--mask_span"), ("--drop_cols nope", "nope / wave"),
    ("--time_col nope", "nope"), ("--split 390 10 0", "test / --split"), ("--split 500 10 10", "520 / 400"),
    ("--split 0.7 0.2 0.2", "exceed 1"), ("--numeric_cols sign", "sign / number"),
    ("--n_embd 30 --n_head 4", "n_embd 30 / n_head 4"), ("--mask_prob 0", "--mask_prob"),
    ("--mask_prob 1", "--mask_prob"), ("--mask_style span --mask_span 1", "--mask_span"),
    ("--mask_share 0.8 --random_share 0.3", "--mask_share / --random_share"), ("--clip 0", "--clip"),
    ("--fill nowhere/filled.csv", "--fill / nowhere"), ("--fill x.xlsx", ".csv"),
    ("--mask_pro 0.2", "--mask_pro"), ("--batch_size 0", "--batch_size"), ("--device cuda:99", "--device"),
    ("--read_csv nonsense=1", "nonsense"), ("--resume", "no such checkpoint")])
def test_a_bad_flag_is_one_sentence(flags, says, toy_csv, tmp_path, capsys):
    refused(lambda: train(toy_csv, tmp_path / "out", flags), capsys, says)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_table_or_none_is_refused_and_kept(finished, toy_csv, tmp_path, capsys):
    out, other = finished, tmp_path / "other.csv"
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    toy(seed=5).rename(columns={"wave": "surf"}).to_csv(other, index=False)
    refused(lambda: resume(out, "--data", other), capsys, "another table")
    refused(lambda: resume(out, "--n_embd 32"), capsys, "another shape")
    refused(lambda: resume(out, "--n_head 4"), capsys, "another shape")         # same weights
    refused(lambda: resume(out, script=train_ar), capsys, "train_ar.py")        # which look alike
    assert before == {f.name: f.read_bytes() for f in out.iterdir()}
    (tmp_path / "last.pt").write_bytes((out / "last.pt").read_bytes()[:1000])
    refused(lambda: resume(tmp_path), capsys, "cannot be read")
    torch.save({"weights": torch.ones(2)}, tmp_path / "last.pt")                # somebody else's
    refused(lambda: resume(tmp_path), capsys, "cannot be read")


def test_an_out_dir_that_cannot_be_written(toy_csv, tmp_path, capsys):
    refused(lambda: train(toy_csv, f"{toy_csv}/out"), capsys, "--out_dir / cannot be made")
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
    index = ",a,b\n" + "".join(f'{i},{hole(f"{round(9 * w)}.0")},{hole("1.50" if w > 0 else "2.25")}\n'
                               for i, w in enumerate(wave))
    wells = "well,day,level,rain\n" + "".join(
        f'{well:03d},{stamp(96 * i, "%Y-%m-%d")},{hole(f"{w + well:.3f}")},'
        f'{hole("dry" if w > 0 else "wet")}\n'
        for i, w in enumerate(wave) for well in range(1, 6) if i < 20 * well + 40)
    return {"european.csv": (european.encode(), "--read_csv 'sep=; decimal=,' --categorical_cols Kennung",
                             {1: {""}, 2: {""}, 3: {""}, 4: {""}}),
            "logger.csv": (logger.encode(), "", {1: {"?"}, 2: {""}, 3: {"-1.18e42", "inf"}}),
            "index.csv": (index.encode(), "", {1: {""}, 2: {""}}),
            "export.csv": (index.replace(",a,b", "\ufeff,a,a").encode(),
                           """--read_csv "na_values=[2.25, 'No Data']" """, {1: {""}, 2: {"", "2.25"}}),
            "wells.csv.gz": (gzip.compress(wells.encode()), "--group_col well", {2: {""}, 3: {""}})}


@pytest.mark.parametrize("name", own_files())
def test_a_file_is_filled_and_otherwise_as_it_was(name, tmp_path, capsys):
    content, flags, marks = own_files()[name]
    (tmp_path / name).write_bytes(content)
    out = tmp_path / f"filled_{name}"
    train(tmp_path / name, tmp_path / "out", "--fill", out, flags)
    said, sep = capsys.readouterr().out, ";" if "sep=;" in flags else ","
    before, after = (pd.read_csv(path, sep=sep, header=None, dtype=str, na_filter=False, encoding="utf-8-sig")
                     for path in (tmp_path / name, out))
    holes = pd.DataFrame({j: before[j].isin(marks.get(j, ())) for j in before})
    assert ((after == before) | holes).all(axis=None) and (holes.any()[list(marks)]).all()
    for j in marks:
        own = before[j][~holes[j]][1:]                      # below the header; numbers have as many decimals
        decimals = own[own.str.fullmatch(r"-?\d+[.,]\d+")].str.replace(r".*[.,]", "", regex=True).str.len()
        number = rf"-?\d+[.,]\d{{{decimals.iloc[0]}}}" if len(decimals) else r"-?\d+"
        filled = after[j][holes[j]]
        assert (filled.isin(own) | filled.str.fullmatch(number)).all(), filled
    counts = [int(x.replace(",", "")) for x in re.findall(r"^.{32} +([\d,]+) +[\d,]+ +\S+ +\S+$",
                                                          said[said.index("filled  "):], re.M)]
    assert sum(counts) == holes.sum().sum()                 # what it says is what it did
    assert ("left empty" in said) == (name == "european.csv")
    naive = pd.read_csv(io.StringIO("a\n007\n1.50\n"), dtype=None).to_csv(index=False)
    assert naive == "a\n7.0\n1.5\n"                         # what pandas alone gives back


@pytest.mark.parametrize("content,manner,options", [
    ("x\n" + "1\n\n" * 60, "1", ""), ("x\n" + "".join(f" {i}.25 \n\n" for i in range(60)), r"\d+\.\d\d", ""),
    ("code,x\n" + "".join(f"{i % 9:04d},{i}\n,\n" for i in range(60)), r"\d{4},\d+", ""),
    ("x|y\n" + "1|2\n|\n" * 60, "1,2", "sep=None engine=python"),
    ("x,y\n" + "1,02\n,\n" * 60, "1,02", "engine=pyarrow")])
def test_what_broke_in_real_exports(content, manner, options, tmp_path):
    """Blank lines that are holes, blanks around numbers, leading zeros, a separator that pandas guesses, and
    another engine."""
    if "pyarrow" in options:
        pytest.importorskip("pyarrow")
    (tmp_path / "in.csv").write_text(content)
    train(tmp_path / "in.csv", tmp_path, "--read_csv", shlex.quote(options), "--fill", tmp_path / "out.csv")
    before, after = ((tmp_path / name).read_text().replace("|", ",").splitlines()
                     for name in ("in.csv", "out.csv"))
    for old, new in zip(before, after, strict=True):
        assert new == old if re.search(r"\w", old) else re.fullmatch(manner, new), (old, new)


def test_a_simulation_is_filled_beside_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(data.SIMULATIONS, "sensors", lambda: data.simulate_sensors(400))
    monkeypatch.chdir(tmp_path)
    Path("sensors").mkdir()
    train("sensors", tmp_path, "--fill filled.csv")
    assert len(pd.read_csv("filled.csv")) == 400


def test_parquet_is_filled_into_a_csv(tmp_path):
    pytest.importorskip("pyarrow")
    seconds = pd.Series(np.arange(400) % 7 + 0.5).mask(np.arange(400) % 5 == 2).to_numpy()
    frame = toy().set_index("date").assign(whole=pd.array([3, None] * 200, dtype="Int64"),
                                           spent=pd.to_timedelta(seconds, unit="s"))
    frame.to_parquet(tmp_path / "toy.parquet")
    train(tmp_path / "toy.parquet", tmp_path, "--fill", tmp_path / "filled.csv")
    filled = pd.read_csv(tmp_path / "filled.csv", parse_dates=["date"], dtype={"wave": str})
    assert filled.notna().all(axis=None) and (filled["whole"] == 3).all()
    assert (filled["date"].to_numpy() == frame.index.to_numpy()).all()
    there = frame["wave"].notna().to_numpy()
    assert np.array_equal(filled["wave"][there].astype(float), frame["wave"][there])           # to the bit
    assert (filled["spent"] == seconds)[~np.isnan(seconds)].all()               # durations, in seconds


def test_each_hole_is_filled_from_the_window_in_which_it_is_most_central():
    groups = np.repeat(list("abcdef"), [3, 40, 16, 77, 17, 1])
    table = table_of({"g": groups, "x": np.arange(154.0)}, "--group_col g --seq_len 16")
    windows, owned = table.owners()                         # each row is owned once
    assert torch.equal(owned.flatten()[1:-1:2], owned.flatten()[2::2]) and owned[-1, 1] == 154
    middle = windows[:, 0] + 15 / 2
    for row in range(154):
        mine, = ((owned[:, 0] <= row) & (row < owned[:, 1])).nonzero().flatten().tolist()
        holds = (windows[:, 0] <= row) & (row < torch.minimum(windows[:, 0] + 16, windows[:, 1]))
        assert holds[mine] and (middle[mine] - row).abs() == (middle - row).abs()[holds].min()
    inner = (owned - windows[:, :1])[(owned != windows).all(dim=1)]     # naive, side by side: 0 to 16
    assert inner.min() >= 4 and inner.max() <= 12


def test_filling_is_what_the_model_says_and_resuming_only_fills(finished, toy_csv, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    resume(tmp_path, "--fill", tmp_path / "filled.csv")
    assert same_bits(finished, tmp_path)
    assert (finished / "log.csv").read_bytes() == (tmp_path / "log.csv").read_bytes()
    table = load_table(mlm_args("--seq_len 16 --data", toy_csv))
    net = model.TableTransformer(model.Config(2, [4], table.clock.shape[1], 16, 1, 2, 16)).eval()
    net.load_state_dict(saved(tmp_path, "best.pt")["model"])
    frame, filled = toy(), pd.read_csv(tmp_path / "filled.csv")
    row = next(i for i in range(100, 300) if np.isnan(frame["wave"][i]) and i % 8 == 0)
    batch = table.batch(torch.tensor([[row - 8, 400]]))     # the window in whose middle it stands
    numeric, ids = net.predict(create_inputs(batch, batch.observed, causal=False))
    said = table.schema.decode(numeric[0], ids[0])["wave"][8]
    assert filled["wave"][row] == pytest.approx(said, abs=1e-5)


def test_the_future_is_written_in_the_manner_of_the_file(tmp_path, capsys):
    rows = [f"{well:03d},{stamp(i)},{i % 7}.{i % 10}0,{'wet' if i % 3 else 'dry'}\n"
            for i in range(60) for well in range(6) if i < 30 + 5 * well]
    (tmp_path / "wells.csv").write_text("well,Zeit,level,weather\n" + "".join(rows))
    train(tmp_path / "wells.csv", tmp_path, "--group_col well --forecast 5 --to", tmp_path / "next.csv",
          script=train_ar)
    assert "median step, 0 days 00:15:00" in capsys.readouterr().out
    rows = pd.read_csv(tmp_path / "next.csv", dtype=str)
    assert list(rows) == ["well", "Zeit", "level", "weather"] and len(rows) == 30
    for well in range(6):
        expected = [stamp(i) for i in range(30 + 5 * well, 35 + 5 * well)]
        assert rows["Zeit"][rows["well"] == f"{well:03d}"].tolist() == expected
    assert rows["level"].str.fullmatch(r"-?\d+\.\d\d").all() and rows["weather"].isin(["dry", "wet"]).all()


def test_the_forecast_is_the_roll_out_from_the_last_rows(toy_csv, tmp_path):
    train(toy_csv, tmp_path, "--drop_cols date --forecast 3 --to", tmp_path / "next.csv", script=train_ar)
    table = load_table(ar_args("--seq_len 16 --drop_cols date --data", toy_csv))
    net = model.TableTransformer(model.Config(2, [4], 0, 16, 1, 2, 16, causal=True)).eval()
    net.load_state_dict(saved(tmp_path, "best.pt")["model"])
    rows = net.rollout(table.batch(torch.tensor([[384, 400]])), torch.zeros(1, 3, 0), 3)
    said = table.schema.decode(rows.numeric[0], rows.categorical[0])
    written = pd.read_csv(tmp_path / "next.csv")
    assert np.allclose(written["wave"], said["wave"]) and (written["sign"] == said["sign"]).all()
    assert list(written) == list(toy()) and written["date"].isna().all()       # left out of training: empty


def test_runs_are_evaluated_beside_cells(toy_csv, tmp_path, capsys):
    train(toy_csv, tmp_path, "--mask_style span --mask_span 6")
    said, test = capsys.readouterr().out, results(tmp_path)["test"]
    assert "mean squared error, scaled, runs" in said and set(test) == {"cell", "span"}
    cell, span = (test[style]["linear"]["mse"][1] for style in ("cell", "span"))
    assert span > 1.3 * cell                                # a line over six rows of this wave is worse


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
             "--dtype bfloat16 --loss huber", "--batch_size 64", "--read_csv 'sep=; header=None'"]
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
    batch = Batch(file * there, nothing.long(), there, torch.ones(4, T).bool(), nothing)
    inputs = create_inputs(batch, there & (torch.rand(file.shape, generator=g) >= rate), causal=False)
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
    history = train(tmp_path / "whole.csv", tmp_path, "--score observed --mask_prob 0.00001 --mask_spread 0 "
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
    """A row that is hidden whole still has a clock, and what is pencilled in."""
    batch, net, hidden = random_batch(missing=0), random_model(), (torch.arange(12) == 5)[None, :, None]
    inputs = create_inputs(batch, batch.observed & ~hidden, causal=False)
    said, other = net(inputs).numeric, net(inputs._replace(clock=batch.clock + hidden)).numeric
    assert torch.isfinite(said).all() and (said != other).any(-1).all()


def test_claim_attention_over_heads_does_not_learn(tmp_path, monkeypatch):
    """Nothing is NaN any more, and yet no row sees another: worse than the right axis from the same start."""
    toy(600, noise=0.05).to_csv(tmp_path / "toy.csv", index=False)
    errors = []
    for attention in (F.scaled_dot_product_attention, model.over_heads):
        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
        train(tmp_path / "toy.csv", tmp_path, LEARN, "--batch_size 16 --max_steps 150 --eval_every 150")
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


def test_masking_and_model_import_nothing_above_them():
    code = "import sys, masking, model; assert not {'data', 'pandas', 'train_mlm'} & set(sys.modules)"
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
    def clip(parameters, limit):
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
    assert run.returncode != 0 and "rank 1: the gradient norm is nan" in run.stderr
    assert "rank 0: the gradient norm is nan" in run.stderr and time.time() - start < 60
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
    loss = mean_losses(net, *ask(table.batch(table.starts("train", 8)), case=("cell", rate))).sum()
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
    ours = mean_losses(random_model(), inputs, targets._replace(score=torch.zeros_like(inputs.shown)))
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
    inputs = create_inputs(tidy(batch), tidy(batch).observed, causal=True)
    return "error", NAN if inputs.attend is not None else random_model(causal=True)(inputs).numeric.sum()


@way(17, "heads for rows: does row 5 depend on row 0?", "kyegomez/FlashMHA#1", "no", "yes")
def _():
    return ["yes" if model.find_leaks(True, wrong)[5, 0] else "no" for wrong in (True, False)]


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
    model.sum_losses(model.Guess(y, []), targets, UNIT[:1]).sum().backward()
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
                gradient = gradient.clamp(-1, 1) * train_mlm.learning_rate(step, args) / 0.05
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
