"""
A table becomes tensors, and tensors become a file like yours, or a picture. This is the only file that reads
tables, and the only one in which a cell is NaN.

    python data.py                      # describe the simulated `sensors` table, and print the tiny one
    python data.py --data my.csv        # what was understood of your own file, before anyone trains on it

A cell is either observed, and then it is a finite number or an id, or it is not, and then it is 0 and a mask
says so. Everything downstream relies on that one promise. The words (B, T, N, K, F, observed, valid, ...) are
defined once, at the top of model.py.
"""
import argparse
import ast
import io
import os
import re
import sys
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from pandas.tseries.api import guess_datetime_format

SENTINEL = 1e30                     # files write "no reading" as -1.18e42; nothing we measure is that big
DATE = (r"\d{4}-?\d\d-?\d\d|\d{1,2}[./-](?:\d{1,2}|[A-Za-z]{3})[./-]\d{2,4}"     # 2024-12-31, 31.12.24
        r"|^\d{4}-(?:\d\d|Q\d)$|^[A-Za-z]{3} \d{4}$")          # and 31-Dec-24, 2024-12, 2024-Q4, Dec 2024
MAX_CATEGORIES = 1000               # a text column with more distinct values than this is an identifier
CYCLES = {"day": 86_400, "year": 365.25 * 86_400}      # in seconds: the hands of the clock
MASK_ID, UNK_ID = 0, 1              # reserved in every categorical column; its own values start at 2
MISSING = ["?", "-", "--", "n.a."]  # markers of a missing cell, beside those that pandas knows


def fail(message):
    """Bad input: one sentence on stderr, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Batch(NamedTuple):
    """B windows of T rows, on the CPU. Holds no NaN: 0.0 / id 0 wherever `observed` is False."""
    numeric: torch.Tensor       # (B, T, N) float32, scaled and clipped
    categorical: torch.Tensor   # (B, T, K) int64, 0 = missing, 1 = [UNK], then the column's own values
    observed: torch.Tensor      # (B, T, F) bool, True = the table has a value here
    valid: torch.Tensor         # (B, T) bool, True = a real row, False = padding on the right
    clock: torch.Tensor         # (B, T, C) float32, sin and cos of the time of day and of the year

    def rows(self, start, end):
        """The same windows, rows start to end - 1 of each."""
        return Batch(*(x[:, start:end] for x in self))


# -----------------------------------------------------------------------------
# sources: simulated tables, and files

def lagged(x, tau):
    """First-order lag of x with time constant tau (rows): what a thermometer in a thick pipe reads."""
    kernel = np.exp(-np.arange(int(8 * tau) + 1) / tau)         # what is older than 8 tau has died away
    padded = np.pad(x, (len(kernel) - 1, 0), mode="edge")       # as if it had been at x[0] for long
    size = 1 << (len(padded) + len(kernel)).bit_length()        # by FFT, since tau may be hundreds of rows
    y = np.fft.irfft(np.fft.rfft(padded, size) * np.fft.rfft(kernel / kernel.sum(), size), size)
    return y[len(kernel) - 1:len(padded)]


def simulate_sensors(n_rows=40_000, seed=0):
    """A pump station at one reading a second, with what real exports have: holes in runs, single dropouts, a
    frozen sensor, a constant and an empty column, spikes, a sentinel, a category that appears late.

    The physics is the pump affinity laws (flow ~ speed, head ~ speed^2, power ~ speed^3), first-order lags
    for heat, and Markov switching between modes. Returns a DataFrame of n_rows rows; same seed, same table.
    """
    rng = np.random.default_rng(seed)
    t = np.arange(n_rows)

    def noise(scale, tau=0.01):
        """Noise of standard deviation `scale` that forgets itself over tau rows (an AR(1) process); 0.01: at
        once, white noise."""
        burn_in, decay = int(8 * tau), np.exp(-1 / tau)
        white = rng.standard_normal(n_rows + burn_in)
        return scale * np.sqrt((1 + decay) / (1 - decay)) * lagged(white, tau)[burn_in:]

    # a mode lasts five minutes on average, a set-point two; both jump
    modes = np.array(["idle", "production", "boost", "flush"])
    # line: the mode that ends, column: the one that follows it
    step = np.array([[0, .8, .1, .1], [.4, 0, .4, .2], [.1, .9, 0, 0], [.6, .4, 0, 0]])
    path = [1]                                  # a Markov chain: what follows depends on what is, alone
    while len(path) < n_rows // 50:
        path.append(rng.choice(4, p=step[path[-1]]))
    # geometric durations are what "a chance a second to end" comes to
    mode = np.repeat(path, rng.geometric(1 / 300, len(path)))[:n_rows]
    trim = np.repeat(rng.normal(0, 60, n_rows), rng.geometric(1 / 120, n_rows))[:n_rows]
    setpoint = np.round(np.array([400, 1450, 1900, 1100])[mode] + trim, -1)
    valve = np.array([0.25, 0.7, 0.9, 1.0])[mode]

    # the machine: the drive hunts round its set-point, the network pushes back on the valve
    speed = lagged(setpoint, 6.0) + noise(35, 5.0)              # rpm
    opening = lagged(valve, 15.0) * (1 + noise(0.05, 8.0))      # share
    flow = 0.06 * speed * opening                               # m3/h
    # bar: the suction side sags under flow, the pump adds its head, and loses some of it to friction
    suction = 2.4 + noise(0.15, 300.0) - 0.004 * flow
    head = 5.2 * (speed / 1500) ** 2 - 0.00022 * flow ** 2
    power = 1.5 + 0.045 * flow * head + 6.0 * (speed / 1500) ** 3       # kW: idling, pumping, friction
    ambient = 18 + 5 * np.sin(2 * np.pi * (t / 86_400 - 0.3)) + noise(0.3, 600.0)
    # mm/s: each mode shakes in its own way, and with the square of the speed
    rough = np.array([0.4, 1.0, 1.3, 2.2])[mode] * (speed / 1500) ** 2
    table = pd.DataFrame({
        "time": pd.Timestamp("2024-03-04 05:00:00") + pd.to_timedelta(t, unit="s"),
        "mode": modes[mode],
        "valve": np.where(opening > 0.8, "open", np.where(opening > 0.4, "throttled", "closed")),
        "speed_setpoint": setpoint,                             # rpm
        "speed": speed + noise(4),                              # rpm, and each sensor adds noise of its own
        "flow": flow + noise(0.8),                              # m3/h
        "pressure_in": suction + noise(0.02),                   # bar
        "pressure_out": suction + head + noise(0.04),           # bar
        "power": power * (1 + noise(0.012)),                    # kW
        "temp_bearing": ambient + 1.6 * lagged(power, 120.0) + noise(0.15),  # degrees, two minutes late
        "temp_outlet": ambient + 0.5 * lagged(power, 40.0) + 6 + noise(0.1),  # degrees
        "vibration": rough * np.exp(noise(0.1) + noise(0.2, 20.0)),  # mm/s
        "temp_ambient": ambient + noise(0.1),                   # degrees
        "line_frequency": 50.0,                                 # Hz, a constant column
        "humidity": np.nan,                                     # an empty one
    }).round({"speed": 0, "flow": 1, "pressure_in": 3, "pressure_out": 2, "power": 2, "temp_bearing": 1,
              "temp_outlet": 1, "vibration": 3, "temp_ambient": 1})     # as many digits as a display has
    return spoil(table, rng)


def spoil(table, rng):
    """What goes wrong on site; returns the same DataFrame with it."""
    n_rows = len(table)
    # column by column: the runs and the single dropouts make 4 to 6 % of holes
    for name in table.columns[1:-2]:
        holes = rng.random(n_rows) < 0.005
        for start in rng.integers(0, n_rows, n_rows // 2000):
            holes[start:start + rng.geometric(1 / 90)] = True           # a minute and a half on average
        table[name] = table[name].mask(holes)
    for start in rng.integers(0, n_rows, 12):                   # a frozen sensor repeats its last value
        table.loc[start:start + rng.geometric(1 / 180), "temp_outlet"] = table["temp_outlet"].iloc[start]
    spikes = rng.random(n_rows) < 0.0002
    table.loc[spikes, "pressure_out"] = 40 * rng.random(spikes.sum())           # water hammer
    table.loc[rng.integers(0, n_rows, 15), "flow"] = -1.18e42           # how a logger says "no reading"
    table.loc[int(0.93 * n_rows):int(0.94 * n_rows), "mode"] = "maintenance"    # never seen in the train rows
    return table


def gravity(x, m):
    """Accelerations of bodies at x (2, bodies, systems) with masses m (bodies, systems); G = 1."""
    a = np.zeros_like(x)
    for i in range(len(m) - 1):                                 # every pair once: Newton's third law
        away = x[:, i + 1:] - x[:, i:i + 1]                     # (2, bodies after i, systems)
        square = away[0] ** 2 + away[1] ** 2
        away /= square * np.sqrt(square)
        a[:, i] += (m[i + 1:] * away).sum(1)
        a[:, i + 1:] -= m[i] * away
    return a


def energy(x, v, m):
    """Kinetic and potential energy of each system, (systems,); shapes as in `gravity`."""
    total = (m * (v ** 2).sum(0)).sum(0) / 2                    # m v^2 / 2 of each body
    for i in range(len(m) - 1):                                 # and -m m' / distance of each pair
        total -= (m[i] * m[i + 1:] / np.sqrt(((x[:, i + 1:] - x[:, i:i + 1]) ** 2).sum(0))).sum(0)
    return total


def integrate(x, v, m, dt, samples, substeps=16):
    """Places and velocities, both (samples, 2, bodies, systems), every dt (systems,), the given ones first.

    Three leapfrogs (drift, kick, drift) of 1.35, -1.70 and 1.35 times the step make a method of fourth order
    that stays symplectic (Yoshida 1990): its energy error oscillates and does not grow.
    """
    cube = 2 ** (1 / 3)
    strides = np.tile(np.array([1, -cube, 1]) / (2 - cube), substeps)[:, None] * dt / substeps
    path = [(x, v)]
    for _ in range(samples - 1):
        for h in strides:                                       # (systems,)
            x = x + h / 2 * v                                   # drift: half a step on, at the old speed,
            v = v + h * gravity(x, m)                           # kick: a new speed, by the pull there,
            x = x + h / 2 * v                                   # drift: the other half
        path.append((x, v))
    return (np.stack(part) for part in zip(*path))


def simulate_systems(n, seed=0):
    """n systems of two to five planets round a star of mass 1.

    Returns here, mass, axis and eccentricity, (5, n), here True = this planet exists; places and velocities,
    (59, 2, 6, n), of star and planets about their centre of mass; how many of the 59 rows count, (n,). A
    planet that does not exist is far away and weighs nothing.
    """
    rng, i, spare = np.random.default_rng(seed), np.arange(5)[:, None], n + n // 20 + 10   # some are left out
    count, rows = rng.integers(2, 6, spare), rng.integers(30, 60, spare)
    here = i < count                                                            # (5, spare), as most below
    order = np.where(here, rng.random((5, spare)), 2).argsort(axis=0)       # planet 0 need not be innermost
    axis = np.where(here, 1 + (rng.uniform(1.5, 3, spare) - 1) * i / (count - 1), 30 + i)
    axis = np.take_along_axis(axis, order, axis=0)
    mass, eccentricity = rng.uniform(1e-5, 5e-5, (5, spare)) * here, rng.uniform(0, 0.1, (5, spare))
    anomaly = rng.uniform(0, 2 * np.pi, (5, spare)) * (rng.random(spare) >= 0.3)    # 30 %: all start at +x
    # place and velocity on a Kepler ellipse at this true anomaly; p is its semi-latus rectum
    p = axis * (1 - eccentricity ** 2)
    x = p / (1 + eccentricity * np.cos(anomaly)) * np.stack([np.cos(anomaly), np.sin(anomaly)])
    v = np.sqrt((1 + mass) / p) * np.stack([-np.sin(anomaly), eccentricity + np.cos(anomaly)])
    m = np.pad(mass, ((1, 0), (0, 0)), constant_values=1)                       # (6, spare), the star first
    x, v = (np.pad(z, ((0, 0), (1, 0), (0, 0))) for z in (x, v))                # (2, 6, spare), at the centre
    x, v = (z - (m * z).sum(1, keepdims=True) / m.sum(0) for z in (x, v))
    # a planet at distance 1 goes round in 2 pi, so two to four times; `rows` rows divide that evenly
    x, v = integrate(x, v, m, rng.uniform(15, 24, spare) / (rows - 1), samples=59)
    # where planets meet, the steps are too long for the energy to stay what it was: such systems are left
    # out, and those that throw a planet far away
    total = np.stack([energy(*moment, m) for moment in zip(x, v)])              # (59, systems)
    lost = (np.abs(x[:, :, 1:]) > 10).any(1) & here                             # (59, 5, systems)
    bad = (np.abs(total / total[0] - 1) > 1e-6) | lost.any(1)
    kept = (~(bad & (np.arange(59)[:, None] < rows)).any(0)).nonzero()[0][:n]
    return [z[..., kept] for z in (here, mass, axis, eccentricity, x, v, rows)]


def simulate_planets(n_systems=3000, seed=0):
    """Planets round a star, one sequence of 30 to 59 rows a system, each with a step size of its own.

    Returns a DataFrame: idx names the system, time_step counts its rows; of each planet its place x, y, and
    what never changes: mass m (in 1e-5 stars), semi-major axis a and eccentricity e (times 20), all missing
    where there is no such planet. acceleration_x and _y are named as in the data set that this is made after:
    "increasing" where the planets' x (y) add up to more than 0. Same seed, same table.
    """
    here, mass, axis, eccentricity, x, _, rows = simulate_systems(n_systems, seed)
    x = np.where(here, x[:, :, 1:], np.nan)                                     # (59, 2, 5, systems)
    system, step = (np.arange(59) < rows[:, None]).nonzero()                    # of each row of the table
    columns = {"idx": system, "time_step": step}
    for i in range(5):                                          # m and e in units that make them about 1
        fixed = {"m": mass[i] * 1e5, "a": axis[i], "e": eccentricity[i] * 20}
        columns |= {f"planet{i}_{c}": x[step, d, i, system] for d, c in enumerate("xy")}
        columns |= {f"planet{i}_{c}": np.where(here[i], value, np.nan)[system] for c, value in fixed.items()}
    columns["total_mass"] = mass.sum(0)[system] * 1e5
    columns["n_planets"] = np.char.add(here.sum(0)[system].astype(str), "_planets")
    for d, c in enumerate("xy"):
        side = np.nansum(x[step, d, :, system], axis=1) > 0
        columns[f"acceleration_{c}"] = np.where(side, "increasing", "decreasing")
    return pd.DataFrame(columns)


def tiny_table():
    """Ten rows that fit on a screen: two rooms, two numeric columns, one category, a few holes."""
    return pd.DataFrame({
        "room": ["a"] * 6 + ["b"] * 4,
        "celsius": [20.0, 21.0, np.nan, 23.0, 22.0, 21.5, 17.0, 17.5, 18.5, np.nan],
        "humidity": [40.0, 42.0, 43.0, np.nan, np.nan, 44.0, 55.0, 54.0, np.nan, 51.0],
        "window": ["shut", "shut", "open", "open", None, "shut", "open", "open", "shut", "shut"],
    })


SIMULATIONS = {"sensors": simulate_sensors, "planets": simulate_planets}
GROUPS = {"planets": "idx"}             # the group column of a simulation, where it has one


def read_options(text, as_text=False):
    """Options for pandas.read_csv, such as "sep=; decimal=,", as a dict. as_text: those that leave every cell
    as it is written, "" where it is empty."""
    options = {}
    for option in re.split(r"\s+(?=\w+=)", text.strip()) if text else []:
        key, _, value = option.partition("=")
        try:
            options[key] = ast.literal_eval(value)              # numbers, lists, None, True ...
        except Exception:
            options[key] = value.replace("\\t", "\t")            # ... and all else is text, such as ";"
    if as_text:
        # all but what turns text into something else: separators, headers, encodings still hold
        typed = "dtype na_values parse_dates converters decimal true_values false_values".split()
        # the engine of pyarrow knows no na_filter
        kept = {key: value for key, value in options.items() if key not in typed and value != "pyarrow"}
        return kept | {"dtype": str, "na_filter": False}
    if not isinstance(options.get("na_values"), dict):      # a dict is for some columns: leave it alone
        options["na_values"] = MISSING + np.ravel(options.get("na_values", [])).tolist()
    return options


def read_table(source, read_csv=None, as_text=False):
    """A DataFrame of at least one row; whatever cannot be read ends in one sentence.

    source: a simulation's name, or a path to .csv, .csv.gz or .parquet; read_csv: see `read_options`.
    as_text: every cell as it is written in the file, or as pandas would write it, "" where empty.
    """
    options = read_options(read_csv, as_text)
    if source in SIMULATIONS and not as_text:
        return SIMULATIONS[source]()
    try:
        # what is no text file is read, and written as pandas would write it
        if as_text and (source in SIMULATIONS or source.endswith(".parquet")):
            text = io.StringIO(read_table(source).to_csv(index=False))
            table = pd.read_csv(text, **read_options(None, as_text))
        elif source.endswith(".parquet"):
            table = pd.read_parquet(source)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", pd.errors.DtypeWarning)     # mixed types are our daily bread
                table = pd.read_csv(source, **options)
        plain = table.index.name is None and isinstance(table.index, pd.RangeIndex)
        ragged = not plain and not read_csv and not source.endswith(".parquet")    # more fields than names
        table = table if plain else table.reset_index()         # where a parquet file keeps its dates
        table.columns = [str(name) for name in table.columns]
        for name in table.select_dtypes("timedelta"):           # a duration is a number, of seconds
            table[name] = table[name].dt.total_seconds()
    except FileNotFoundError:
        fail(f"{source}: no such file (--data takes a path or one of: {', '.join(SIMULATIONS)})")
    except Exception as e:      # foreign files and options raise anything: half a .gz, no pyarrow ...
        why = (str(e).strip().splitlines() or [type(e).__name__])[0]
        hint = {ImportError: "; pip install pyarrow",
                UnicodeDecodeError: "; in another encoding? --read_csv encoding=latin-1",
                pd.errors.ParserError: "; another separator, or lines before the header? --read_csv 'sep=;' "
                                       "or 'skiprows=2'"}.get(type(e), "")
        by = f" with {read_csv!r}" if read_csv else ""
        fail(f"{source}: pandas cannot read this table{by} ({why}){hint}")
    if len(table) == 0:
        fail(f"{source}: the table has no rows")
    if table.shape[1] == 1 and "skip_blank_lines" not in options and source.endswith((".csv", ".csv.gz")):
        return read_table(source, f"{read_csv or ''} skip_blank_lines=False", as_text)   # blank: a hole
    if not table.columns.is_unique:
        fail(f"{source}: several columns are called {table.columns[table.columns.duplicated()][0]!r}")
    if ragged or table.shape[1] == 1 and set(table.columns[0]) & set(";\t|"):
        fail(f"{source}: the columns come out wrong: is the separator another one? --read_csv 'sep=;'")
    # one word among numbers keeps pandas from reading any of them, and then their commas and points stay
    comma, point = options.get("decimal", "."), options.get("thousands") or "\0"            # \0: none
    for name in table.columns if (comma, point) != (".", "\0") else []:
        if pd.api.types.infer_dtype(table[name], skipna=True) == "string":
            dotted = table[name].str.replace(rf"{re.escape(point)}(?=\d\d\d\b)", "", regex=True)
            dotted = dotted.str.replace(comma, ".")
            if pd.to_numeric(dotted, errors="coerce").notna().sum() >= 0.9 * dotted.notna().sum():
                table[name] = dotted
    return table


# -----------------------------------------------------------------------------
# what kind of column is this?

def as_time(column):
    """The column as time stamps if every value that is there reads as one, else None."""
    text = column.dropna()
    # a number may be a year or seconds since 1970, or neither: who says --time_col sorts by it as it is
    if pd.api.types.is_numeric_dtype(column) or len(text) == 0:
        return None
    for options in ({}, {"dayfirst": True}, {"format": "ISO8601"}, {"utc": True}):      # last: several zones
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # pandas warns where it has to guess the format
            try:
                if pd.to_datetime(text.iloc[:1], **options).notna().all():      # do not parse a million words
                    stamps = pd.to_datetime(column, **options)
                    if pd.api.types.is_datetime64_any_dtype(stamps):
                        return stamps
            except (ValueError, TypeError):
                pass                                        # not this way
    return None


def infer_kind(column, source):
    """"numeric", "categorical", "time" or "dropped: why", from the values of one column."""
    if pd.api.types.infer_dtype(column, skipna=True) in ("boolean", "categorical"):
        return "categorical"                                # True with holes has dtype object, not bool
    if not pd.api.types.is_datetime64_any_dtype(column):
        numeric = pd.to_numeric(column, errors="coerce").notna().sum()
        if numeric >= 0.9 * column.notna().sum():           # a "Bad" among numbers is a missing number
            return "numeric"
    # pandas reads "M3" and "may" as dates, too: 9 of 10 words must look like one, and all must parse
    words = column.dropna().astype(str).drop_duplicates()
    dates = words.str.contains(DATE)
    if dates.mean() >= 0.9:
        if as_time(column) is not None:
            return "time"
        odd = words[~dates].iloc[0] if not dates.all() else words.iloc[-1]
        fail(f"{source}: {column.name!r} does not read as time stamps in one format (such as {odd!r}): "
             f"--read_csv 'skiprows=[1]' leaves out a row of units, --drop_cols {column.name} the column")
    if len(words) > MAX_CATEGORIES:                         # each would have a class and a vector of its own
        return f"dropped: over {MAX_CATEGORIES} distinct texts (--numeric_cols, --categorical_cols keep it)"
    return "categorical"


def infer_kinds(table, args):
    """{column: "time", "group", "numeric", "categorical" or "dropped: why"}.

    Flags win over inference; without --time_col the first column of time stamps is the time column, and is
    turned into time stamps in place.
    """
    # what the user said ...
    flags = {"time": [args.time_col], "group": [args.group_col or GROUPS.get(args.data)],
             "numeric": args.numeric_cols, "categorical": args.categorical_cols,
             "dropped: --drop_cols": args.drop_cols}
    kinds = {name: kind for kind, names in flags.items() for name in names if name}
    for name in kinds:
        if name not in table.columns:
            some = ", ".join(table.columns[:12]) + (" ..." if table.shape[1] > 12 else "")
            fail(f"{args.data}: there is no column {name!r}; it has {some}")
    # ... and what the values of the other columns say
    for name in table.columns:
        if name not in kinds:
            kind = infer_kind(table[name], args.data)
            second = kind == "time" and "time" in kinds.values()        # rows are sorted by one
            kinds[name] = "dropped: a second time column" if second else kind
        if name in args.numeric_cols and np.isnan(numbers(table[name])[0]).all():
            fail(f"{args.data}: no value of column {name!r} reads as a number")
        if kinds[name] == "time" and not pd.api.types.is_numeric_dtype(table[name]):    # numbers sort already
            table[name] = as_time(table[name])
            if table[name].isna().all():
                fail(f"{args.data}: --time_col {name} does not read as time stamps, all in one format")
    if not {"numeric", "categorical"} & set(kinds.values()):
        fail(f"{args.data}: no usable column: it needs numbers or categories beside the time and the group")
    return {name: kinds[name] for name in table.columns}    # in the order of the file, not of the flags


def numbers(column):
    """A column as float64, NaN where it is missing, no number, infinite or a sentinel; and how many were the
    latter three. In float64, since in float32 -1.18e42 is beyond its range, and large numbers lose digits."""
    missing = column.isna().to_numpy()                      # (rows,), what the file itself calls missing
    x = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan, copy=True)
    x[~(np.abs(x) <= SENTINEL)] = np.nan                    # `not <=` catches nan, inf and sentinel in one go
    return x, int((np.isnan(x) & ~missing).sum())


def labels(column):
    """A column as text, missing where it was missing; 1.0 in an integer column with holes reads "1"."""
    return column.convert_dtypes().astype("string")


# -----------------------------------------------------------------------------
# the schema: everything that is learned about columns, from train rows only

@dataclass
class Schema:
    """Names, scales and vocabularies of the columns; plain Python, so that it can live in a checkpoint."""
    numeric: list               # N names
    categorical: list           # K names
    center: list                # N, in original units
    scale: list                 # N, in original units, never 0
    vocabulary: list            # K lists of labels, the commonest first; label i has id i + 2
    cycles: list                # C / 2 names out of CYCLES
    clip: float                 # scaled values are clipped to +-clip

    def vocab_sizes(self):
        """V_k of each categorical column, the two reserved ids included; an empty one is guessed as id 2."""
        return [2 + max(1, len(v)) for v in self.vocabulary]

    def decode(self, numeric, categorical):
        """(..., N) scaled values and (..., K) ids -> {column: values in original units, or labels}, as numpy.
        The reserved ids become None: there is no label to give."""
        columns = {name: numeric[..., j].double().numpy() * self.scale[j] + self.center[j]
                   for j, name in enumerate(self.numeric)}
        for k, name in enumerate(self.categorical):
            labels_by_id = np.array([None, None, *(self.vocabulary[k] or [None])], dtype=object)    # (V_k,)
            columns[name] = labels_by_id[categorical[..., k].numpy()]
        return columns


def fit_scale(x, scaler):
    """center and scale of one float64 column of train rows; a constant or an empty one has scale 1.

    It is clipped at its 0.1 % and 99.9 % quantiles first, so that one spike does not set the scale of all.
    """
    x = x[~np.isnan(x)]
    if len(x) == 0:
        return 0.0, 1.0
    x = np.clip(x, *np.quantile(x, [0.001, 0.999]))         # for the statistics alone
    low, median, high = np.quantile(x, [0.25, 0.5, 0.75])
    center, scale = {"standard": (x.mean(), x.std()), "robust": (median, high - low),
                     "none": (x.mean(), 1.0)}[scaler]
    return float(center), float(scale) if scale > 1e-9 * abs(center) else 1.0   # a constant's std is rounding


def fit_schema(table, kinds, is_train, args):
    """Scales, vocabularies and cycles, from the rows where is_train, (rows,) bool, is True alone."""
    numeric, categorical, time = ([name for name in kinds if kinds[name] == kind]
                                  for kind in ("numeric", "categorical", "time"))
    scales = [fit_scale(numbers(table[name])[0][is_train], args.scaler) for name in numeric]
    # commonest first, so that id 2 is what one would guess without a model; then by name
    counts = [labels(table[name])[is_train].value_counts().sort_index() for name in categorical]
    vocabulary = [n.sort_values(ascending=False, kind="stable").index.tolist() for n in counts]
    # a cycle that the train rows have not seen twice tells dates apart, not seasons, and is learnt by heart
    stamps = [table[name][is_train] for name in time if pd.api.types.is_datetime64_any_dtype(table[name])]
    cycles = [cycle for cycle in CYCLES for t in stamps
              if (t.max() - t.min()).total_seconds() >= 2 * CYCLES[cycle]]
    return Schema(numeric, categorical, [center for center, _ in scales], [scale for _, scale in scales],
                  vocabulary, cycles, args.clip)


def make_clock(keys, cycles):
    """Table.keys -> (rows, 2 * cycles) float32: sin and cos of the place in each cycle."""
    if not cycles:                                          # then there may be no time stamps at all
        return np.zeros((len(keys), 0), np.float32)
    # an angle has no midnight at which it jumps, as hours from 0 to 23 do
    stamps, periods = keys.iloc[:, 0], np.array([CYCLES[cycle] for cycle in cycles])        # in seconds
    midnight = pd.Timestamp("2000-01-01", tz=stamps.dt.tz)
    angle = 2 * np.pi * (stamps - midnight).dt.total_seconds().to_numpy()[:, None] / periods
    return np.nan_to_num(np.hstack([np.sin(angle), np.cos(angle)])).astype(np.float32)     # NaT: 0


# -----------------------------------------------------------------------------
# the table: rows as tensors, splits as ranges of rows, windows cut from them

@dataclass
class Table:
    """All rows of a table, encoded once; windows are cut out of it by row number."""
    schema: Schema
    numeric: torch.Tensor       # (rows, N) float32, 0.0 where not observed
    categorical: torch.Tensor   # (rows, K) int32, 0 where not observed
    observed: torch.Tensor      # (rows, F) bool
    clock: torch.Tensor         # (rows, C) float32
    facts: dict                 # numeric: [repaired, mean, std, min, max], time: [first, last, step, repeats]
    kinds: dict                 # column of the file -> what it was taken for
    keys: pd.DataFrame          # the time column, if there is one; its index: which row of the file it was
    seq_len: int                # T
    segments: dict              # split -> (S, 2) int64, [start, end) rows of S sequences that may be read;
                                # "all" -> every sequence whole

    def starts(self, split, stride):
        """Windows every `stride` rows, and a last one flush with the end, so that no row of the split is left
        out: (windows, 2) int64, the first row of each and the end of its sequence."""
        windows = []
        for start, end in self.segments[split].tolist():
            last = max(start, end - self.seq_len)           # a sequence shorter than T has one window
            windows += [(s, end) for s in (*range(start, last, stride), last)]
        return torch.tensor(windows)

    def sample(self, split, batch_size, generator):
        """Windows at any offset, each equally likely: (batch_size, 2), as in `starts`."""
        start, end = self.segments[split].unbind(1)                             # (S,) each
        offsets = (end - start - self.seq_len + 1).clamp(min=1)                 # a short sequence has one
        # number all offsets of all sequences, one after the other, and draw among the numbers
        u = torch.randint(int(offsets.sum()), (batch_size,), generator=generator)       # (B,)
        sequence = torch.searchsorted(offsets.cumsum(0), u, right=True)
        offset = u - (offsets.cumsum(0) - offsets)[sequence]
        return torch.stack([start[sequence] + offset, end[sequence]], dim=1)

    def batch(self, windows):
        """(B, 2) windows of `starts` or `sample` -> Batch, padded on the right where a sequence ends."""
        rows = windows[:, :1] + torch.arange(self.seq_len)                      # (B, T)
        valid = rows < windows[:, 1:]
        rows = torch.minimum(rows, windows[:, 1:] - 1)                          # padding: zeroed below
        real = valid[..., None]                                                 # (B, T, 1)
        return Batch(self.numeric[rows] * real, self.categorical[rows].long() * real,
                     self.observed[rows] & real, valid, self.clock[rows] * real)

    def learnt(self):
        """(F,) bool, True = the column has a value in the train rows, so the model has met it."""
        return sum(self.observed[start:end].any(dim=0) for start, end in self.segments["train"].tolist()) > 0

    def owners(self):
        """Overlapping windows of every sequence, and the rows [start, end) that each is to speak for: those
        nearer to its middle than to the next one's. Returns windows and owned, both (windows, 2) int64."""
        windows = self.starts("all", max(1, self.seq_len // 2))         # which overlap by half
        start, end = windows.unbind(1)
        following = start.roll(-1)                          # in the same sequence if it starts before its end
        until = torch.where((following > start) & (following < end),
                            (start + following + self.seq_len) // 2, end)
        return windows, torch.tensor([0, *until.tolist()]).unfold(0, 2, 1)      # each from the last one's end

    def coming(self, steps):
        """The keys of the rows that come next, `steps` for each sequence, the time column continued at its
        median step; and their clock, (sequences, steps, C)."""
        # the last row of each sequence, `steps` times; then its time, moved on
        keys = self.keys.iloc[(self.segments["all"][:, 1] - 1).repeat_interleave(steps)]
        for name in keys:
            # its latest stamp, not that of its last row: rows without one are sorted to the end
            last = [self.keys[name].iloc[start:end].max() for start, end in self.segments["all"].tolist()]
            ahead = np.tile(np.arange(1, steps + 1), len(last))
            keys = keys.assign(**{name: pd.Series(last).repeat(steps).array + ahead * self.facts[name][2]})
        return keys, torch.from_numpy(make_clock(keys, self.schema.cycles)).unflatten(0, (-1, steps))


def encode(table, kinds, schema):
    """DataFrame -> the fields of Table from `numeric` to `keys`. Takes the DataFrame apart column by column,
    so that a big table is not held twice."""
    n_rows, N, K = len(table), len(schema.numeric), len(schema.categorical)
    numeric, categorical = np.zeros((n_rows, N), np.float32), np.zeros((n_rows, K), np.int32)
    observed, facts = np.zeros((n_rows, N + K), bool), {}   # facts: to be printed; --forecast goes on by them
    for j, name in enumerate(schema.numeric):
        x, repaired = numbers(table.pop(name))              # the last place where a cell is NaN
        here = observed[:, j] = ~np.isnan(x)
        seen = x[here] if here.any() else x[:1]             # one NaN, for there is no mean of nothing
        facts[name] = [repaired, seen.mean(), seen.std(), seen.min(), seen.max()]
        x = np.clip((x - schema.center[j]) / schema.scale[j], -schema.clip, schema.clip)
        numeric[:, j] = np.where(here, x, 0.0)              # all in float64 up to here, where it is cast
    for k, name in enumerate(schema.categorical):
        text = labels(table.pop(name))
        code = pd.Index(schema.vocabulary[k], dtype="string").get_indexer(text)     # -1: not in train, UNK_ID
        here = observed[:, N + k] = text.notna()
        categorical[:, k] = np.where(here, code + 2, MASK_ID)
    group, time = ([name for name in kinds if kinds[name] == kind] for kind in ("group", "time"))
    keys = table[time]
    for name in keys:
        steps = (table.groupby(group, dropna=False) if group else table)[name].diff()   # none between groups
        facts[name] = [keys[name].min(), keys[name].max(), steps.median(), int((steps == 0 * steps).sum())]
    clock = make_clock(keys, schema.cycles)
    return [*map(torch.from_numpy, (numeric, categorical, observed, clock)), facts, kinds, keys]


def split_counts(n, what, args):
    """--split -> three counts of n rows (or groups); what is over stays unused."""
    split = args.split
    if sum(split) <= 1 + 1e-6:                              # 0.7 + 0.15 + 0.15 is a little more than 1
        # edges are rounded, not counts, so that nothing is lost between the parts
        counts = np.diff([round(n * sum(split[:i]) + 1e-9) for i in range(4)])
        for i in range(3):                                  # of a few groups none rounds to nothing
            if split[i] and not counts[i] and n >= 3:
                counts[np.argmax(counts)] -= max(counts) > 1
                counts[i] = 1
    elif any(c % 1 for c in split):                         # 0.9 0.15 0.15: neither shares nor counts
        fail(f"--split {split}: fractions must not exceed 1 together")
    else:
        counts = [int(c) for c in split]
        if sum(counts) > n:
            fail(f"--split asks for {sum(counts)} {what}, but {args.data} has {n}")
    for name, count in zip(("train", "val", "test"), counts):
        if count == 0:
            fail(f"{args.data}: {n} {what}, split as {split}, leave no {name} window (--split)"
                 + "; below three groups, leave --group_col out" * (what == "groups" and n < 3))
    return counts


def split_rows(lengths, args):
    """T, and the segments of Table. lengths: rows of each group, in row order; one entry without groups.

    One sequence is split by time. As the ETTh1 protocol has it (Zhou 2021), a val or test window may begin up
    to T rows before its part. Several groups are split by group, shuffled with a fixed seed.
    """
    ends = np.cumsum(lengths)                                                   # (groups,)
    ranges = np.stack([ends - lengths, ends], axis=1)                           # (groups, 2)
    if len(lengths) == 1:
        a, b, c = np.cumsum(split_counts(int(lengths[0]), "rows", args))
        seq_len = int(min(args.seq_len, a))                 # so a - seq_len is a row
        parts = [[(0, a)], [(a - seq_len, b)], [(b - seq_len, c)]]
    else:
        a, b, c = np.cumsum(split_counts(len(lengths), "groups", args))
        # not the first groups to train on: files are sorted, and the last wells are the newest
        order = np.random.default_rng(0).permutation(len(lengths))
        parts = [ranges[np.sort(order[lo:hi])] for lo, hi in ((0, a), (a, b), (b, c))]
        seq_len = int(min(args.seq_len, np.diff(parts[0]).max()))
    return seq_len, {name: torch.tensor(np.array(part), dtype=torch.int64)
                     for name, part in zip(("train", "val", "test", "all"), [*parts, ranges])}


def load_table(args, table=None):
    """args: the flags of `make_parser`; table: a DataFrame to use instead of args.data. Returns a Table."""
    table = read_table(args.data, args.read_csv) if table is None else table.reset_index(drop=True)
    kinds = infer_kinds(table, args)
    group, time = ([name for name in kinds if kinds[name] == kind] for kind in ("group", "time"))
    for name in group:
        table[name] = labels(table[name])                                       # mixed types do not sort
    if group + time:                                        # equal times keep their order; index: row of file
        table = table.sort_values(group + time, kind="stable")
    # without a group column all rows are one group; in the same, sorted order
    lengths = table.groupby(group or np.zeros(len(table)), dropna=False).size().to_numpy()
    seq_len, segments = split_rows(lengths, args)
    is_train = np.zeros(len(table), bool)                   # the rows that statistics may be taken from
    for start, end in segments["train"].tolist():
        is_train[start:end] = True
    schema = fit_schema(table, kinds, is_train, args)
    return Table(schema, *encode(table, kinds, schema), seq_len, segments)


# -----------------------------------------------------------------------------
# and back: files, whole or not at all; the user's own as it was, with some cells of our own

def check_target(flag, path, source):
    """Before minutes of training: can `path` be written, and is it another file than the one that is read?"""
    folder = os.path.dirname(path) or "."               # path.tmp is renamed: the folder must allow it
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        fail(f"{flag} {path} cannot be written: {folder} must be a folder that may be written to")
    if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
        fail(f"{flag} {path} is the table itself; give the result another name")
    if not path.endswith((".csv", ".csv.gz")):
        fail(f"{flag} {path}: what is written is a .csv or a .csv.gz")


def replace_file(path, write):
    """Write beside the file, then rename: whoever kills us finds the old file or the new one, never half."""
    try:
        write(path + ".tmp")
        os.replace(path + ".tmp", path)                 # on one disk this happens whole or not at all
    except (OSError, RuntimeError) as e:                # RuntimeError: torch, where the disk is full
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        fail(f"{path} cannot be written ({str(e).splitlines()[0]}); what was there before is kept")


class Cells:
    """The user's file as text, in the order of the table, and new cells in the manner of its columns."""

    def __init__(self, table, args):
        self.table, self.options = table, read_options(args.read_csv)
        text = read_table(args.data, args.read_csv, as_text=True)
        if len(text) != len(table.observed) or not {*table.kinds} <= {*text}:
            fail(f"{args.data}: its rows or columns are others when it is read as text (--read_csv)")
        self.text = text.iloc[table.keys.index]             # whose own index says where each row was
        self.header = dict(zip(self.text, self.text))       # name to us -> name in the file
        self.encoding = self.options.get("encoding", "utf-8")
        renamed = {"header", "names", "usecols", "index_col"} & {*self.options}
        if os.path.isfile(args.data) and not args.data.endswith(".parquet") and not renamed:
            # pandas renames columns that are called alike or not at all, and hides Excel's byte order mark
            options = read_options(args.read_csv, as_text=True) | {"header": None, "nrows": 1}
            options.pop("skipfooter", None)                     # which does not go with nrows
            self.header = dict(zip(self.text, pd.read_csv(args.data, **options).iloc[0]))
            with open(args.data, "rb") as file:
                self.encoding = "utf-8-sig" if file.read(3) == b"\xef\xbb\xbf" else self.encoding

    def like(self, name, values):
        """Scaled values or ids, (n,), as n texts: numbers with as many decimals as their column has, whole
        where it is whole; categories as the column spells them first."""
        schema = self.table.schema
        j, N = (schema.numeric + schema.categorical).index(name), len(schema.numeric)
        seen = self.table.observed[:, j].numpy()
        own = self.text.loc[seen, name].astype(object)          # the column's own cells
        if j >= N:
            spelling = own.groupby(self.table.categorical[:, j - N].numpy()[seen]).first()
            return spelling.reindex(values.numpy()).to_numpy()
        own, point = own.str.strip(), self.options.get("decimal", ".")
        decimals = own.str.extract(rf"{re.escape(point)}(\d+)$", expand=False).fillna("")
        digits = min(15, int(decimals.str.len().quantile(0.95)))        # one 20.400000000000002 is no manner
        x = values.double().numpy() * schema.scale[j] + schema.center[j]
        if own.str.contains("e", case=False).any():             # 1.2e-05 has no fixed number of them
            return np.array([f"{v:.6g}".replace(".", point) for v in x], dtype=object)
        x = np.round(x, 0 if decimals.str.strip("0").eq("").all() else digits) + 0.0        # no "-0"
        width = own.str.len().max() if own.str.fullmatch(r"0\d+").any() else 0      # 0148
        return np.array([f"{v:0{width}.{digits}f}".replace(".", point) for v in x], dtype=object)

    def stamps(self, name, times):
        """Time stamps or numbers, a Series, as the column of that name writes its own; else as ISO 8601."""
        own = self.text[name].to_numpy()[:100]
        if not pd.api.types.is_datetime64_any_dtype(times):
            return times.convert_dtypes().astype(str)           # 2020.0 is 2020
        for options in ({}, {"dayfirst": True}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                 # of a day that cannot be a month
                form = guess_datetime_format(own[0], **options)
            if form and (self.table.keys[name].iloc[:100].dt.strftime(form) == own).all():
                return times.dt.strftime(form)
        return times.astype(str)

    def write(self, path, text):
        """A DataFrame of texts, with the file's own header, separator and encoding."""
        sep = self.options.get("sep", self.options.get("delimiter")) or ","     # None: pandas found it out
        header = self.options.get("header", 0) is not None and [self.header[name] for name in text]
        # a pattern such as \s+ can be read by, not written; and the name ends in .tmp until all is on disk
        text.to_csv(path, index=False, header=header, sep=sep if len(sep) == 1 else ",",
                    encoding=self.encoding,
                    compression="gzip" if path.removesuffix(".tmp").endswith(".gz") else None)


# -----------------------------------------------------------------------------
# pictures

COLORS = {"model": "#0072B2", "linear": "#E69F00", "last": "#009E73", "season": "#CC79A7", "mean": "#999999",
          "val": "#0072B2", "train": "#999999"}             # for the eyes of all (Okabe 2008)


def draw_windows(Figure, schema, batch, asked, guesses):
    """Windows of a Batch: what was seen, what was asked, (B, T, F) bool, and {method: guesses (B, T, N)}.
    Columns named _x and _y are drawn in the plane, else the four of window 0 that move most, over its rows.
    Figure: matplotlib's, handed in, since matplotlib may be missing."""
    names, rows = schema.numeric, np.arange(batch.valid.shape[1])               # N, (T,)
    planes = [(name, name[:-1] + "y") for name in names if name[-2:] == "_x" and name[:-1] + "y" in names]
    seen, asked = ((batch.observed & mask)[..., :len(names)].numpy() for mask in (~asked, asked))
    first = pd.DataFrame(batch.numeric[0].numpy(), columns=names).where(seen[0] | asked[0])
    moving = first.std(ddof=0)[asked[0].any(axis=0)].nlargest(4).index      # and have something to guess
    panels = [(b, planes) for b in range(len(asked))] if planes else [(0, [(None, name)]) for name in moving]
    n = max(1, len(panels))                             # a table without numbers gets an empty picture
    figure = Figure(figsize=(9, 3.2 if planes else 1.9 * n), layout="constrained")
    axes = figure.subplots(*((1, n) if planes else (n, 1)), squeeze=False, sharex=not planes)
    # the same colours and marks for the same thing in all pictures
    layers = [("seen", batch.numeric, seen, dict(marker=".", color="black", ms=4)),
              ("truth", batch.numeric, asked, dict(marker="o", color="black", mfc="none", ms=5))]
    layers += [(name, x, asked, dict(marker="x" if name != "model" else ".", color=COLORS[name], ms=5))
               for name, x in guesses.items() if name == "model" or not planes]
    for axis, (b, curves) in zip(axes.flat, panels):
        for label, numeric, here, look in layers:
            values = {None: rows, **schema.decode(numeric[b], batch.categorical[b])}        # own units
            # dots alone: a line would claim to know what lies between
            for across, up in curves:
                mask = here[b, :, names.index(up)]
                axis.plot(values[across][mask], values[up][mask], ls="",
                          label=label if up == curves[0][1] else None, **look)
        axis.set(aspect="equal" if planes else "auto",
                 ylabel="y" if planes else curves[0][1].replace("$", r"\$"))    # no TeX in column names
    figure.supxlabel("x" if planes else "row of the window", fontsize="medium")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=6, loc="outside upper left", frameon=False)
    return figure


def draw_lines(Figure, x, lines, **labels):
    """A figure of {name: y} over x, y on a logarithmic scale."""
    figure = Figure(figsize=(7, 4))
    axis = figure.subplots()
    for name, y in lines.items():
        axis.plot(x, y, marker="." if len(x) < 50 else None, color=COLORS[name], label=name)    # few: dots
    axis.set(yscale="log", **labels)                    # errors differ by factors, not by amounts
    axis.legend(frameon=False)
    return figure


def draw_pictures(folder, schema, history, curve, windows):
    """loss.png, errors.png and window.png, or one line where there is no matplotlib.

    history: rows of log.csv; curve and windows: what a script's `examine` returns.
    """
    try:
        from matplotlib.figure import Figure                # and not pyplot: files, no window
    except ImportError:
        return print("no pictures without matplotlib: pip install matplotlib")
    log = pd.DataFrame(history, columns=["step", "train", "val"])           # a point a log line
    axis, cases, means = curve
    errors = {name: means[name]["mse"] for name in means}
    for name, figure in {
            "loss.png": draw_lines(Figure, log["step"], log[["train", "val"]], xlabel="step", ylabel="loss"),
            "errors.png": draw_lines(Figure, cases, errors, xlabel=axis, ylabel="mean squared error, scaled"),
            "window.png": draw_windows(Figure, schema, *windows)}.items():
        figure.savefig(os.path.join(folder, name), dpi=120, bbox_inches="tight")
        print(f"wrote {os.path.join(folder, name)}")


# -----------------------------------------------------------------------------
# seeds, flags, and what this file prints when run by itself

def step_generator(*key):
    """A CPU generator seeded by a key such as (seed, step, rank). All that is random in a step comes from one
    of these, so no generator state is saved anywhere: resuming and several processes cannot disagree."""
    key = len(key), *key                                    # or (0, 1) and (0, 1, 0) would be the same
    # SeedSequence hashes: neighbouring steps get seeds that have nothing in common
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def number(kind, low, high=2.0 ** 53, inside=False):
    """An argparse type: an int or a float from low to high (inside: without the ends)."""
    def parse(text):
        value = kind(text)
        if not (low < value < high if inside else low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not {'inside' if inside else 'in'} {low} to {high}")
        return value
    parse.__name__ = kind.__name__                          # "invalid int value: 'x'", says argparse
    return parse


def make_parser(doc, script, source):
    """A parser with the flags that say what the table is, for this file and the two training scripts."""
    # no config files: `--help` is the documentation, and a misspelt flag is an error
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Defaults in the help of each flag, and the docstring as it stands."""
    parser = argparse.ArgumentParser(description=doc, usage=f"python {script}.py [--flag value ...]",
                                     formatter_class=Formatter, allow_abbrev=False)
    add = parser.add_argument_group("data").add_argument
    add("--data", default=source, help=f".csv, .csv.gz or .parquet, or simulated: {', '.join(SIMULATIONS)}")
    add("--read_csv", metavar="OPTIONS", help='for pandas.read_csv, such as "sep=; decimal=,"')
    add("--split", type=number(float, 0), nargs=3, default=[0.7, 0.15, 0.15], metavar="PART",
        help="train, val, test: fractions, or counts of rows, in order of time (of groups, shuffled)")
    add("--time_col", help="the column to sort by (else the first one that reads as time stamps)")
    add("--group_col", help="its values are separate sequences; no window crosses over")
    add("--numeric_cols", nargs="+", default=[], metavar="COL", help="columns to read as numbers")
    add("--categorical_cols", nargs="+", default=[], metavar="COL", help="columns to read as categories")
    add("--drop_cols", nargs="+", default=[], metavar="COL", help="columns to leave out")
    add("--scaler", choices=["standard", "robust", "none"], default="standard",
        help="by mean and std, by median and IQR, or own units, only centred (then mind --clip)")
    add("--clip", type=number(float, 0, inside=True), default=10.0, help="scaled values are cut to +- this")
    add("--seq_len", type=number(int, 1), default=96, help="T, rows of a window")
    return parser


def tiny_batch():
    """The tiny table as a Table whose ten rows are all train rows, and its two sequences as one Batch: what
    this file, masking.py and model.py print when run by themselves, so that one cell can be followed through
    all three."""
    args = make_parser(None, "data", "the tiny table").parse_args(["--group_col", "room"])
    frame = tiny_table()
    kinds = infer_kinds(frame, args)
    schema = fit_schema(frame, kinds, np.ones(len(frame), bool), args)
    segments = {"train": torch.tensor([[0, 6], [6, 10]])}           # two rooms, six rows and four
    table = Table(schema, *encode(frame, kinds, schema), seq_len=6, segments=segments)
    return table, table.batch(table.starts("train", 6))


def show(schema, numeric, categorical, present, valid):
    """(B, T, N) numbers and (B, T, K) ids as text, "?" where `present` (B, T, F) is False, "pad" beyond
    `valid`."""
    header = "".join(f"{name:>10}" for name in schema.numeric + schema.categorical)     # a block a window
    blocks = []
    for b in range(len(valid)):
        lines = [f"window {b}{header}"]
        for t in range(valid.shape[1]):
            values = [f"{x:.2f}" for x in numeric[b, t].tolist()] + categorical[b, t].tolist()
            values = [v if p else "?" for v, p in zip(values, present[b, t].tolist())]
            lines.append(f"row {t}   " + "".join(f"{v if valid[b, t] else 'pad':>10}" for v in values))
        blocks.append(lines)
    return "\n".join("      ".join(lines) for lines in zip(*blocks))


def describe(table, args):
    """Print what was understood: a line a column, then how the rows were split."""
    schema, rows = table.schema, len(table.observed)
    print(f"{args.data}: {rows:,} rows, clock: {', '.join(schema.cycles) or 'none'}")
    print("".join(f"{word:>11}" for word in ("missing", "repaired", "mean", "std", "min", "max")))
    # statistics of the whole file, in its own units: what one would check by eye
    for j, name in enumerate(schema.numeric):
        repaired, *statistics = table.facts[name]
        print(f"{1 - table.observed[:, j].double().mean():>11.2%}{repaired:>11}"
              + "".join(f"{value:>11.4g}" for value in statistics) + f"   {name}")
    for k, name in enumerate(schema.categorical):
        ids, words = table.categorical[:, k], schema.vocabulary[k]
        # a column of numbers with too many words among them
        odd = len(words) > 20 and bool(pd.to_numeric(pd.Series(words), errors="coerce").notna().mean() > 0.5)
        print(f"{(ids == MASK_ID).double().mean():>11.2%}   {name}: {len(words)} categories ("
              + ", ".join(words[:6]) + f"), not seen in train: {int((ids == UNK_ID).sum())} rows"
              + f"; are they numbers? --numeric_cols {name}" * odd)
    for name, kind in table.kinds.items():
        if kind not in ("numeric", "categorical"):
            time = "from {} to {}, median step {}, {} stamps repeated"
            more = time.format(*table.facts[name]) if name in table.facts else kind[9:]
            print(f"{kind.split(':')[0]:>11}   {name}  {more}".rstrip())
    for split in ("train", "val", "test"):
        segments = table.segments[split]
        n_rows = int((segments[:, 1] - segments[:, 0]).sum())
        # side by side: how much there is to see; training draws windows at any offset
        print(f"{split:>11}   {n_rows:,} rows, {len(segments)} sequence(s), "
              f"{len(table.starts(split, table.seq_len)):,} windows of {table.seq_len} rows side by side")
    if len(table.segments["all"]) == 1:                     # as split_rows has it
        print(f"windows of val and test may begin up to {table.seq_len} rows early; these rows count twice")


if __name__ == "__main__":
    args = make_parser(__doc__, "data", "sensors").parse_args()
    describe(load_table(args), args)
    if args.data in SIMULATIONS:
        table, batch = tiny_batch()
        print(f"\nthe tiny table in its own units, and\n{tiny_table().to_string(index=False)}\n\n"
              "as one batch: scaled, categories as ids, ? where nothing was observed")
        print(show(table.schema, batch.numeric, batch.categorical, batch.observed, batch.valid))
        print("\n".join(f"{name:<12}{tuple(x.shape)!s:<12}{x.dtype}" for name, x in batch._asdict().items()))
