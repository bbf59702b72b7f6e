"""
A table becomes tensors. This is the only file that knows pandas, and the only one in which a NaN exists.

    python data.py                       # describe the simulated `sensors` table, and print the tiny one
    python data.py --data my.csv         # what was understood of your own file, before anyone trains on it

A cell is either observed, and then it is a finite number (or an id), or it is not, and then it is 0 and a
mask says so. Everything downstream relies on that one promise. The words (B, T, N, K, F, observed, valid,
...) are defined once, at the top of model.py. """
import argparse
import ast
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

SENTINEL = 1e30  # sensor files write "no reading" as -1.18e42 and the like; nothing we measure is that big
MAX_CATEGORIES = 1000  # a text column with more distinct values than this is an identifier, not a category
MASK_ID, UNK_ID = 0, 1      # ids every categorical column reserves; its own values start at 2


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
    clock: torch.Tensor  # (B, T, C) float32, sin and cos of the time of day and of the year; C is 0 or 4


# -----------------------------------------------------------------------------
# sources: simulated tables, and files

def lagged(x, tau):
    """First-order lag of x with time constant tau (rows): what a thermometer in a thick pipe reads."""
    kernel = np.exp(-np.arange(int(8 * tau) + 1) / tau)
    padded = np.concatenate([np.full(len(kernel) - 1, x[0]), x])
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

    def noise(scale, tau=None):
        """White noise, or with tau an AR(1) process of the same standard deviation."""
        white = rng.standard_normal(n_rows)
        return scale * (white if tau is None else lagged(white, tau) * np.sqrt(2 * tau + 1))

    # a mode lasts five minutes on average, a set-point two; both jump, nothing else does
    modes = np.array(["idle", "production", "boost", "flush"])
    step = np.array([[0, .8, .1, .1], [.4, 0, .4, .2], [.1, .9, 0, 0], [.6, .4, 0, 0]])
    path = [1]
    while len(path) < n_rows // 50:
        path.append(rng.choice(4, p=step[path[-1]]))
    mode = np.repeat(path, rng.geometric(1 / 300, len(path)))[:n_rows]
    trim = np.repeat(rng.normal(0, 60, n_rows), rng.geometric(1 / 120, n_rows))[:n_rows]
    setpoint = np.round(np.array([400, 1450, 1900, 1100])[mode] + trim, -1)
    valve = np.array([0.25, 0.7, 0.9, 1.0])[mode]

    # the machine: the drive hunts round its set-point, the network pushes back on the valve
    speed = lagged(setpoint, 6.0) + noise(35, 5.0)
    opening = lagged(valve, 15.0) * (1 + noise(0.05, 8.0))
    flow = 0.06 * speed * opening
    suction = 2.4 + noise(0.15, 300.0) - 0.004 * flow
    head = 5.2 * (speed / 1500) ** 2 - 0.00022 * flow ** 2
    power = 1.5 + 0.045 * flow * head + 6.0 * (speed / 1500) ** 3
    ambient = 18 + 5 * np.sin(2 * np.pi * (t / 86_400 - 0.3)) + noise(0.3, 600.0)
    rough = np.array([0.4, 1.0, 1.3, 2.2])[mode] * (speed / 1500) ** 2
    table = pd.DataFrame({
        "time": pd.Timestamp("2024-03-04 05:00:00") + pd.to_timedelta(t, unit="s"),
        "mode": modes[mode],
        "valve": np.where(opening > 0.8, "open", np.where(opening > 0.4, "throttled", "closed")),
        "speed_setpoint": setpoint,
        "speed": speed + noise(4),
        "flow": flow + noise(0.8),
        "pressure_in": suction + noise(0.02),
        "pressure_out": suction + head + noise(0.04),
        "power": power * (1 + noise(0.012)),
        "temp_bearing": ambient + 1.6 * lagged(power, 120.0) + noise(0.15),
        "temp_outlet": ambient + 0.5 * lagged(power, 40.0) + 6 + noise(0.1),
        "vibration": rough * np.exp(noise(0.1) + noise(0.2, 20.0)),
        "temp_ambient": ambient + noise(0.1),
        "line_frequency": 50.0,
        "humidity": np.nan,
    }).round({"speed": 0, "flow": 1, "pressure_in": 3, "pressure_out": 2, "power": 2, "temp_bearing": 1,
              "temp_outlet": 1, "vibration": 3, "temp_ambient": 1})

    # what goes wrong on site, column by column: the runs and the single dropouts make about 5 % of holes
    for name in table.columns[1:-2]:
        holes = rng.random(n_rows) < 0.005
        for start in rng.integers(0, n_rows, n_rows // 2000):
            holes[start:start + rng.geometric(1 / 90)] = True
        table[name] = table[name].mask(holes)
    for start in rng.integers(0, n_rows, 12):  # a frozen sensor repeats its last value for minutes
        stop = min(start + rng.geometric(1 / 180), n_rows)
        table.loc[start:stop, "temp_outlet"] = table["temp_outlet"].iloc[start]
    spikes = rng.random(n_rows) < 0.0002
    table.loc[spikes, "pressure_out"] = 40 * rng.random(spikes.sum())
    table.loc[rng.integers(0, n_rows, 15), "flow"] = -1.18e42
    table.loc[int(0.93 * n_rows):int(0.94 * n_rows), "mode"] = "maintenance"    # never seen in the train rows
    return table


def tiny_table():
    """Ten rows that fit on a screen: two rooms, two numeric columns, one category, a few holes."""
    return pd.DataFrame({
        "room": ["a"] * 6 + ["b"] * 4,
        "celsius": [20.0, 21.0, np.nan, 23.0, 22.0, 21.5, 17.0, 17.5, 18.5, np.nan],
        "humidity": [40.0, 42.0, 43.0, np.nan, np.nan, 44.0, 55.0, 54.0, np.nan, 51.0],
        "window": ["shut", "shut", "open", "open", None, "shut", "open", "open", "shut", "shut"],
    })


SIMULATIONS = {"sensors": simulate_sensors}


def read_table(source, read_csv=""):
    """source: a simulation's name, or a path to .csv, .csv.gz or .parquet; read_csv: "sep=; decimal=,",
    handed to pandas.read_csv. Returns a DataFrame of at least one row; anything that cannot be read ends in
    one sentence."""
    if source in SIMULATIONS:
        return SIMULATIONS[source]()
    options = {}
    for option in read_csv.split():
        key, _, value = option.partition("=")
        try:
            options[key] = ast.literal_eval(value)              # numbers, lists, None, True ...
        except (ValueError, SyntaxError):
            options[key] = value                                # ... and everything else is text, such as ";"
    try:
        table = pd.read_parquet(source) if source.endswith(".parquet") else pd.read_csv(source, **options)
    except FileNotFoundError:
        fail(f"{source}: no such file (--data takes a path or one of: {', '.join(SIMULATIONS)})")
    except ImportError:
        fail(f"{source}: pandas needs pyarrow to read parquet; `pip install pyarrow`, or save the table as .csv")
    except TypeError as e:
        fail(f"--read_csv {read_csv!r}: {e}")
    except (pd.errors.EmptyDataError, pd.errors.ParserError, ValueError, OSError) as e:
        fail(f"{source}: pandas cannot read this table ({str(e).strip().splitlines()[0]})")
    if len(table) == 0:
        fail(f"{source}: the table has no rows")
    table.columns = table.columns.astype(str)
    return table


# -----------------------------------------------------------------------------
# what kind of column is this?

def as_time(column):
    """The column as time stamps if every value that is there reads as one, else None."""
    text = column.dropna()
    if pd.api.types.is_numeric_dtype(column) or text.empty:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # pandas warns where it has to guess the format
        if pd.to_datetime(text.iloc[:1], errors="coerce", utc=True).isna().any():
            return None                                     # saves parsing a long column of words
        try:
            stamps = pd.to_datetime(column, errors="coerce")
        except ValueError:                                  # several time zones in one column
            stamps = pd.to_datetime(column, errors="coerce", utc=True)
    return stamps if stamps.notna().sum() == len(text) else None


def infer_kind(column):
    """"numeric", "categorical", "time" or "dropped: why", from the values of one column."""
    if pd.api.types.infer_dtype(column, skipna=True) in ("boolean", "categorical"):
        return "categorical"  # True with holes in it is an object column to pandas
    if not pd.api.types.is_datetime64_any_dtype(column):
        numeric = pd.to_numeric(column, errors="coerce").notna().sum()
        if numeric >= 0.9 * column.notna().sum():  # "Bad" and "No Data" among numbers are missing numbers
            return "numeric"
    if as_time(column) is not None:
        return "time"
    if column.nunique() > MAX_CATEGORIES:
        return f"dropped: more than {MAX_CATEGORIES} distinct texts (--categorical_cols keeps it)"
    return "categorical"


def infer_kinds(table, args):
    """{column: "time" | "group" | "numeric" | "categorical" | "dropped: why"}; turns the time column into
    time stamps in place. Flags win over inference; without --time_col the first column of time stamps is the
    time column."""
    flags = {"time": [args.time_col] if args.time_col else [], "group": [args.group_col] if args.group_col else [],
             "numeric": args.numeric_cols, "categorical": args.categorical_cols, "dropped: --drop_cols": args.drop_cols}
    kinds = {name: kind for kind, names in flags.items() for name in names}
    for name in kinds:
        if name not in table.columns:
            some = ", ".join(table.columns[:12]) + (" ..." if table.shape[1] > 12 else "")
            fail(f"{args.data}: there is no column {name!r}; it has {some}")
    for name in table.columns:
        if name not in kinds:
            kind = infer_kind(table[name])
            kinds[name] = "dropped: a second time column" if kind == "time" and "time" in kinds.values() else kind
        if kinds[name] == "time":
            stamps = as_time(table[name])
            table[name] = table[name] if stamps is None else stamps  # a number can sort rows, but is no clock
    if not {"numeric", "categorical"} & set(kinds.values()):
        fail(f"{args.data}: no usable column: there must be numbers or categories beside the time and the group")
    return {name: kinds[name] for name in table.columns}


def numbers(column):
    """A column as float64 with NaN for whatever is missing, is no number, is infinite or is a sentinel. The
    test is made in float64: in float32 -1.18e42 is -inf already. Also returns how many values were taken out
    so."""
    missing = column.isna().to_numpy()
    x = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan, copy=True)
    x[~(np.abs(x) <= SENTINEL)] = np.nan  # `not <=` catches nan, inf and sentinel in one go
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
    n_clock: int                # C
    center: list                # N, in original units
    scale: list                 # N, in original units, never 0
    vocabulary: list            # K lists of labels, the most frequent first; label i has id i + 2
    clip: float                 # scaled values are clipped to +-clip

    def vocab_sizes(self):
        """V_k of each categorical column, the two reserved ids included."""
        return [len(v) + 2 for v in self.vocabulary]

    def decode(self, numeric, categorical):
        """(..., N) scaled values and (..., K) ids -> a dict {column: values in original units, or labels},
        numpy.
        The reserved ids become None: there is no label to give."""
        columns = {name: numeric[..., j].double().numpy() * self.scale[j] + self.center[j]
                   for j, name in enumerate(self.numeric)}
        for k, name in enumerate(self.categorical):
            columns[name] = np.array([None, None] + self.vocabulary[k], dtype=object)[categorical[..., k].numpy()]
        return columns


def fit_scale(x, scaler):
    """center, scale of one float64 column (train rows, NaN = missing), statistics after clipping at the 0.1
    % and 99.9 % quantiles so that one spike does not set the scale. A constant or empty column gets scale
    1."""
    x = x[~np.isnan(x)]
    if len(x) == 0:
        return 0.0, 1.0
    x = np.clip(x, *np.quantile(x, [0.001, 0.999]))
    low, median, high = np.quantile(x, [0.25, 0.5, 0.75])
    center, scale = {"standard": (x.mean(), x.std()), "robust": (median, high - low), "none": (x.mean(), 1.0)}[scaler]
    return float(center), float(scale) if scale > 1e-9 * abs(center) else 1.0   # a constant's std is rounding


def fit_schema(table, kinds, is_train, args):
    """is_train: (rows,) bool. Nothing here looks at a row outside it."""
    schema = Schema([c for c in kinds if kinds[c] == "numeric"], [c for c in kinds if kinds[c] == "categorical"],
                    n_clock=0, center=[], scale=[], vocabulary=[], clip=args.clip)
    for name in schema.numeric:
        center, scale = fit_scale(numbers(table[name])[0][is_train], args.scaler)
        schema.center.append(center)
        schema.scale.append(scale)
    for name in schema.categorical:
        counts = labels(table[name][is_train]).value_counts()
        schema.vocabulary.append(sorted(counts.index.tolist(), key=lambda label: (-counts[label], label)))
    times = [name for name in kinds if kinds[name] == "time" and pd.api.types.is_datetime64_any_dtype(table[name])]
    schema.n_clock = 4 * len(times)
    return schema


def make_clock(stamps):
    """(rows,) time stamps -> (rows, 4) float32: sin and cos of the time of day and of the day of the year."""
    day = (stamps.dt.hour * 3600 + stamps.dt.minute * 60 + stamps.dt.second) / 86_400
    year = (stamps.dt.day_of_year - 1 + day) / 365.25
    angles = 2 * np.pi * np.stack([day, year], axis=1)                          # (rows, 2)
    clock = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)            # (rows, 4)
    return np.nan_to_num(clock).astype(np.float32)  # a missing time stamp has no clock


# -----------------------------------------------------------------------------
# the table: rows as tensors, splits as ranges of rows, windows cut from them

@dataclass
class Table:
    """All rows of a table, encoded once; windows are cut out of it by row number."""
    schema: Schema
    numeric: torch.Tensor       # (rows, N) float32
    categorical: torch.Tensor   # (rows, K) int32
    observed: torch.Tensor      # (rows, F) bool
    clock: torch.Tensor         # (rows, C) float32
    repaired: dict              # column -> values that were no number, infinite or a sentinel
    seq_len: int                # T
    segments: dict              # split -> (S, 2) int64, [start, end) rows of each sequence that may be read

    def starts(self, split, stride):
        """(W, 2) int64, start row and end of its sequence: windows every `stride` rows, and the last one
        flush with the end, so that no row of the split is left out."""
        windows = []
        for start, end in self.segments[split].tolist():
            last = max(start, end - self.seq_len)
            windows += [(s, end) for s in sorted({*range(start, last + 1, stride), last})]
        return torch.tensor(windows)

    def sample(self, split, batch_size, generator):
        """Like `starts`, but (batch_size, 2) windows at any offset, each equally likely."""
        start, end = self.segments[split].unbind(1)
        offsets = (end - start - self.seq_len + 1).clamp(min=1)  # a short sequence has one: its start
        u = torch.randint(int(offsets.sum()), (batch_size,), generator=generator)
        sequence = torch.searchsorted(offsets.cumsum(0), u, right=True)
        offset = u - (offsets.cumsum(0) - offsets)[sequence]
        return torch.stack([start[sequence] + offset, end[sequence]], dim=1)

    def batch(self, windows):
        """(B, 2) start row and end of sequence -> Batch, padded on the right where the sequence ends
        early."""
        rows = windows[:, :1] + torch.arange(self.seq_len)                      # (B, T)
        valid = rows < windows[:, 1:]
        rows = torch.where(valid, rows, windows[:, 1:] - 1)
        observed = self.observed[rows] & valid[..., None]                       # (B, T, F)
        is_numeric, is_category = observed.split([self.numeric.shape[1], self.categorical.shape[1]], dim=-1)
        return Batch(self.numeric[rows] * is_numeric, self.categorical[rows].long() * is_category,
                     observed, valid, self.clock[rows] * valid[..., None])


def encode(table, kinds, schema):
    """DataFrame -> numeric (rows, N), categorical (rows, K), observed (rows, F), clock (rows, C), repaired.
    One column at a time, each dropped from the DataFrame once it is encoded: a big table is never held
    twice."""
    n_rows, n_numeric, n_categorical = len(table), len(schema.numeric), len(schema.categorical)
    numeric = np.zeros((n_rows, n_numeric), np.float32)
    categorical = np.zeros((n_rows, n_categorical), np.int32)
    observed = np.zeros((n_rows, n_numeric + n_categorical), bool)
    repaired = {}
    for j, name in enumerate(schema.numeric):
        x, repaired[name] = numbers(table.pop(name))
        observed[:, j] = ~np.isnan(x)
        x = np.clip((x - schema.center[j]) / schema.scale[j], -schema.clip, schema.clip)  # float64, then cast
        numeric[:, j] = np.where(observed[:, j], x, 0.0)
    for k, name in enumerate(schema.categorical):
        text = labels(table.pop(name))
        # -1 = missing, or not in train
        code = pd.Index(schema.vocabulary[k], dtype="string").get_indexer(text)
        observed[:, n_numeric + k] = text.notna()
        categorical[:, k] = np.where(observed[:, n_numeric + k], code + 2, MASK_ID)
    clock = np.zeros((n_rows, 0), np.float32)
    if schema.n_clock:
        clock = make_clock(table[next(name for name in kinds if kinds[name] == "time")])
    return [*map(torch.from_numpy, (numeric, categorical, observed, clock)), repaired]


def split_counts(split, n, what, args):
    """Three fractions, or three counts -> three counts of n rows (or groups); what is over stays unused."""
    if min(split) < 0 or sum(split) == 0:
        fail(f"--split {split}: give three positive fractions or three counts")
    if sum(split) <= 1 + 1e-6:
        edges = [round(n * sum(split[:i]) + 1e-9) for i in range(4)]
        counts = [b - a for a, b in zip(edges, edges[1:])]
    else:
        counts = [int(c) for c in split]
        if sum(counts) > n:
            fail(f"--split asks for {sum(counts)} {what}, but {args.data} has {n}")
    for name, count in zip(("train", "val", "test"), counts):
        if count == 0:
            fail(f"{args.data}: {n} {what} split as {split} leave the {name} part without a window; change --split")
    return counts


def split_rows(lengths, args):
    """lengths: rows of each group, in row order (one entry where there are no groups). Returns T and the
    segments.

    One sequence is split by time. As the ETTh1 protocol has it, a val or test window may begin up to T rows
    before its part. Several groups are split by group, shuffled once with a fixed seed: no row is in two
    parts. """
    ends = np.cumsum(lengths)
    ranges = np.stack([ends - lengths, ends], axis=1)                           # (groups, 2)
    if len(lengths) == 1:
        a, b, c = np.cumsum(split_counts(args.split, int(lengths[0]), "rows", args))
        seq_len = int(min(args.seq_len, a))
        parts = [[(0, a)], [(max(0, a - seq_len), b)], [(max(0, b - seq_len), c)]]
    else:
        a, b, c = np.cumsum(split_counts(args.split, len(lengths), "groups", args))
        order = np.random.default_rng(0).permutation(len(lengths))
        parts = [ranges[np.sort(order[lo:hi])] for lo, hi in ((0, a), (a, b), (b, c))]
        seq_len = int(min(args.seq_len, (parts[0][:, 1] - parts[0][:, 0]).max()))
    return seq_len, {name: torch.tensor(np.array(part), dtype=torch.int64)
                     for name, part in zip(("train", "val", "test"), parts)}


def load_table(args, table=None):
    """args: the flags of `add_arguments`; table: a DataFrame to use instead of args.data. Returns a Table."""
    table = read_table(args.data, args.read_csv) if table is None else table.copy()
    kinds = infer_kinds(table, args)
    by = [name for kind in ("group", "time") for name in kinds if kinds[name] == kind]
    if by:
        table = table.sort_values(by, kind="stable", ignore_index=True)  # equal time stamps keep their order
    lengths = np.array([len(table)])
    if "group" in kinds.values():
        lengths = table.groupby(by[0], sort=True, dropna=False).size().to_numpy()
    seq_len, segments = split_rows(lengths, args)
    is_train = np.zeros(len(table), bool)
    for start, end in segments["train"].tolist():
        is_train[start:end] = True
    schema = fit_schema(table, kinds, is_train, args)
    return Table(schema, *encode(table, kinds, schema), seq_len, segments)


def step_generator(*key):
    """A CPU generator seeded by a key such as (seed, step, rank). Every random thing of a step comes from
    one of these, so no generator state is ever saved: resuming, several processes and prefetching cannot
    disagree."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def number(kind, low, high=float("inf"), inside=False):
    """An argparse type: an int or a float from low to high (inside: without the ends)."""
    def parse(text):
        value = kind(text)
        if not (low < value < high if inside else low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not {'inside' if inside else 'in'} {low} to {high}")
        return value
    parse.__name__ = kind.__name__                          # "invalid int value: 'x'", says argparse
    return parse


def add_arguments(parser, source):
    """The flags that say what the table is; shared by this file and both training scripts."""
    add = parser.add_argument
    add("--data", default=source, help=f"a .csv, .csv.gz or .parquet file, or one of: {', '.join(SIMULATIONS)}")
    add("--read_csv", default="", metavar="OPTIONS", help='for pandas.read_csv, such as "sep=; decimal=,"')
    add("--split", type=float, nargs=3, default=[0.7, 0.15, 0.15], metavar=("TRAIN", "VAL", "TEST"),
        help="fractions, or counts of rows (of groups, with --group_col), in the order of time")
    add("--time_col", default="", help="the column to sort by (found where one reads as time stamps)")
    add("--group_col", default="", help="its values separate sequences: no window crosses from one to the next")
    add("--numeric_cols", nargs="+", default=[], metavar="COL", help="columns to read as numbers")
    add("--categorical_cols", nargs="+", default=[], metavar="COL", help="columns to read as categories")
    add("--drop_cols", nargs="+", default=[], metavar="COL", help="columns to leave out")
    add("--scaler", choices=["standard", "robust", "none"], default="standard",
        help="by mean and std, by median and IQR, or own units, only centred (then mind --clip)")
    add("--clip", type=number(float, 0, inside=True), default=10.0, help="scaled values are cut to +- this")
    add("--seq_len", type=number(int, 1), default=96, help="T, rows of a window")


def tiny_batch():
    """The tiny table as a Table whose ten rows are all train rows, and its two sequences as one Batch: what
    this file, masking.py and model.py print when run by themselves, so that one cell can be followed through
    all three."""
    parser = argparse.ArgumentParser()
    add_arguments(parser, "the tiny table")
    args = parser.parse_args(["--group_col", "room"])
    frame = tiny_table()
    kinds = infer_kinds(frame, args)
    schema = fit_schema(frame, kinds, np.ones(len(frame), bool), args)
    table = Table(schema, *encode(frame, kinds, schema), seq_len=6, segments={"train": torch.tensor([[0, 6], [6, 10]])})
    return table, table.batch(table.starts("train", 6))


def show(schema, numeric, categorical, present, valid):
    """(B, T, N) numbers and (B, T, K) ids as text, "?" where `present` (B, T, F) is False, "pad" beyond
    `valid`."""
    header = "".join(f"{name:>10}" for name in schema.numeric + schema.categorical)
    blocks = []
    for b in range(len(valid)):
        lines = [f"window {b}{header}"]
        for t in range(valid.shape[1]):
            values = [f"{x:.2f}" for x in numeric[b, t].tolist()] + [str(i) for i in categorical[b, t].tolist()]
            values = [v if p else "?" for v, p in zip(values, present[b, t].tolist())]
            lines.append(f"row {t}   " + "".join(f"{v if valid[b, t] else 'pad':>10}" for v in values))
        blocks.append(lines)
    return "\n".join("      ".join(lines) for lines in zip(*blocks))


def describe(table, args):
    """Print what was understood: a line a column, the split, one batch."""
    schema, rows = table.schema, len(table.observed)
    print(f"{args.data}: {rows:,} rows, {len(schema.numeric)} numeric and {len(schema.categorical)} categorical columns, "
          + ("a time column" if schema.n_clock else "no time column"))
    print(f"{'column':<18}{'kind':<13}{'missing':>8}{'repaired':>9}{'mean':>11}{'std':>10}{'min':>10}{'max':>10}")
    for j, name in enumerate(schema.numeric):
        here = table.observed[:, j]
        x = table.numeric[here, j].double() * schema.scale[j] + schema.center[j]
        stats = (x.mean(), x.std(correction=0), x.min(), x.max()) if len(x) else ()
        print(f"{name:<18}{'numeric':<13}{1 - here.double().mean():>8.2%}{table.repaired[name]:>9}"
              f"{''.join(f'{float(v):>11.4g}' if i == 0 else f'{float(v):>10.4g}' for i, v in enumerate(stats))}")
    for k, name in enumerate(schema.categorical):
        ids = table.categorical[:, k]
        seen = ", ".join(schema.vocabulary[k][:6]) + (" ..." if len(schema.vocabulary[k]) > 6 else "")
        print(f"{name:<18}{'categorical':<13}{(ids == MASK_ID).double().mean():>8.2%}{'':>9}  "
              f"{len(schema.vocabulary[k])} values: {seen}; [UNK] in {int((ids == UNK_ID).sum())} rows")
    for split, segments in table.segments.items():
        print(f"{split:<6}{int((segments[:, 1] - segments[:, 0]).sum()):>9,} rows in {len(segments)} sequence(s), "
              f"{len(table.starts(split, table.seq_len)):,} windows of {table.seq_len}")
    print("means, stds, ranges over all rows; the scales used come from train rows alone")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add_arguments(parser, "sensors")
    args = parser.parse_args()
    describe(load_table(args), args)
    table, batch = tiny_batch()
    print(f"\nthe tiny table in its own units, and\n{tiny_table().to_string(index=False)}\n\n"
          "as one batch: scaled, categories as ids, ? where nothing was observed")
    print(show(table.schema, batch.numeric, batch.categorical, batch.observed, batch.valid))
    print("\n".join(f"{name:<12}{tuple(x.shape)!s:<12}{x.dtype}" for name, x in batch._asdict().items()))
