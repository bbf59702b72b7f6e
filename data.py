"""
A table becomes tensors, and tensors become a table again. This is the only file in which a cell is NaN.

    python data.py                      # describe the simulated `sensors` table, and print the tiny one
    python data.py --data my.csv        # what was understood of your own file, before anyone trains on it

A cell is either observed, and then it is a finite number or an id, or it is not, and then it is 0 and a mask
says so. Everything downstream relies on that one promise. The words (B, T, N, K, F, observed, valid, ...) are
defined at the top of model.py.
"""
import argparse
import csv
import io
import os
import re
import sys
import warnings
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from pandas.api.types import is_numeric_dtype
from pandas.tseries.api import guess_datetime_format
from pandas.tseries.offsets import BMonthEnd, CustomBusinessDay, DateOffset

SENTINEL = 1e19                     # files write "no reading" as 1e20 or -1.18e42; nothing is that big
MISSING = ["", "NA", "N/A", "n/a", "n.a.", "#N/A", "<NA>", "NaN", "nan", "NAN", "NULL", "null", "None",
           "?", "-", "--", "---", ".", ".."]            # words for it, beside --na_values
MAX_CATEGORIES = 1000               # a text column with more distinct values than this is an identifier
CYCLES = {"day": 86_400, "week": 604_800, "year": 365.25 * 86_400}      # in seconds: the hands of the clock
NO_ID = 0                           # of a missing category ...
UNK_ID = 1                          # ... and of one that the train rows do not have; their own start at 2


class Batch(NamedTuple):
    """B windows of T rows, on the CPU. Holds no NaN: 0.0 / id 0 wherever `observed` is False."""
    numeric: torch.Tensor       # (B, T, N) float32, scaled
    categorical: torch.Tensor   # (B, T, K) int64, 0 = missing, 1 = [UNK], then the column's own values
    observed: torch.Tensor      # (B, T, F) bool, True = there is a value here; numeric columns first
    valid: torch.Tensor         # (B, T) bool, True = a real row, False = padding on the right
    clock: torch.Tensor         # (B, T, C) float32, sin and cos of the time of day, of the week, of the year
    time: torch.Tensor          # (B, T) float32, in median steps since the window's first row

    def rows(self, start, end):
        """The same windows, rows start to end - 1 of each."""
        return Batch._make(x[:, start:end] for x in self)


@dataclass
class Schema:
    """Names, scales and vocabularies of the columns; plain Python, so that it can live in a checkpoint."""
    numeric: list               # N names
    categorical: list           # K names
    center: list                # N, in original units
    scale: list                 # N, in original units, never 0
    vocabulary: list            # K lists of labels, the commonest first; label i has id i + 2
    learnt: list                # F bools, True = the train rows have a value of this column
    cycles: list                # C / 2 names out of CYCLES

    def vocab_sizes(self):
        """V_k of each categorical column; one without a label is guessed as id 2."""
        return [2 + max(1, len(labels)) for labels in self.vocabulary]  # 2: missing and [UNK]


@dataclass
class Table:
    """All rows of a table, encoded once; windows are cut out of it by row number."""
    schema: Schema
    numeric: torch.Tensor       # (rows, N) float32, 0.0 where not observed
    categorical: torch.Tensor   # (rows, K) int32, 0 where not observed
    observed: torch.Tensor      # (rows, F) bool
    clock: torch.Tensor         # (rows, C) float32
    time: torch.Tensor          # (rows,) float64, in median steps
    keys: pd.DataFrame          # (rows, 2) "group" and "time" of each row. Its index is the row of the file;
                                # numbers beyond its end are rows that --regular inserts
    time_columns: list          # of the file
    pattern: str                # for strftime; "s" or "ms": since 1970; "elapsed": 37:15; or "number"
    kinds: dict                 # column of the file -> what it was taken for
    seq_len: int                # T
    segments: dict              # split -> (S, 2) int64, [start, end) rows of S sequences; val and test may
                                # begin up to T rows early, see split_rows; "all" -> every sequence whole
    unlike: dict                # numeric column -> how many times more it varies than in its calmest group

    def starts(self, split, stride):
        """Windows every `stride` rows, and a last one flush with the end, so that no row of the split is left
        out: (windows, 2) int64, the first row of each and the end of its sequence."""
        start, end = self.segments[split].unbind(1)                             # (S,) each
        room = (end - start - self.seq_len).clamp(min=0)    # a sequence shorter than T has one window
        count = 1 + (room + stride - 1) // stride           # (S,), windows of each
        sequence = torch.arange(len(count)).repeat_interleave(count)            # (windows,), of which it is
        number = torch.arange(len(sequence)) - (count.cumsum(0) - count)[sequence]      # 0 for its first
        row = start[sequence] + torch.minimum(number * stride, room[sequence])
        return torch.stack([row, end[sequence]], dim=1)

    def sample(self, split, batch_size, generator):
        """Windows at any offset, each equally likely: (batch_size, 2), as in `starts`."""
        windows = self.starts(split, 1)
        return windows[torch.randint(len(windows), (batch_size,), generator=generator)]

    def batch(self, windows):
        """(B, 2) windows of `starts` or `sample` -> Batch, padded on the right where a sequence ends."""
        rows = windows[:, :1] + torch.arange(self.seq_len)                      # (B, T)
        valid = rows < windows[:, 1:]                       # (B, T)
        rows = torch.minimum(rows, windows[:, 1:] - 1)              # padding: zeroed below, but for its time
        real = valid[..., None]                                                 # (B, T, 1)
        time = self.time[rows]
        return Batch(numeric=self.numeric[rows] * real,
                     categorical=self.categorical[rows].long() * real,
                     observed=self.observed[rows] & real,
                     valid=valid,
                     clock=self.clock[rows] * real,
                     time=(time - time[:, :1]).float())


def load_table(args, frame=None, schema=None):
    """args: the flags of `make_parser`; frame: a DataFrame to use instead of args.data; schema: of a
    checkpoint, and then nothing is learned from this file. Returns a Table."""
    if schema:                                              # whatever this file looks like
        args.numeric_cols = schema.numeric
        args.categorical_cols = schema.categorical
    if frame is None:
        frame = read_frame(args)                            # NaN where nothing is
    frame = frame.reset_index(drop=True)                    # rows are known by their number alone
    texts = frame.select_dtypes(exclude="number").columns
    frame = frame.astype(dict.fromkeys(texts, "string"))    # dates and true/false as in a .csv
    args.group_col = args.group_col or GROUPS.get(args.data)
    kinds = infer_kinds(frame, args)                        # what each column is taken for
    columns, pattern, stamps = read_time(frame, kinds, args)        # or the numbers of the rows
    keys = pd.DataFrame({"group": "", "time": stamps})      # whose row it is, and of when
    if args.group_col:
        keys["group"] = frame[args.group_col].astype("string").fillna("")
    keys["group"] = keys["group"].where(keys["time"].notna())   # without a time: last, in no sequence
    if keys["group"].isna().all():
        fail(f"{args.data}: no row has a time in {' '.join(columns)!r} (--time_col)")
    frame = read_cells(frame, kinds, args)                  # from here on what is to be learnt, alone
    if schema:
        frame = frame[schema.numeric + schema.categorical]  # in that order, without what is new
    if args.regular:
        frame, keys = insert_absent_rows(frame, keys, args)
    keys = keys.sort_values(["group", "time"])              # equal times keep their order
    if not keys.index.is_monotonic_increasing:              # one in order need not be copied
        frame = frame.iloc[keys.index]
    lengths = keys["group"].value_counts(sort=False).to_numpy()     # rows of each group
    seq_len, segments = split_rows(lengths, args, schema)   # T: --seq_len, or less
    is_train = np.zeros(len(frame), bool)                   # the rows that statistics may be taken from
    for start, end in segments["train"].tolist():
        is_train[start:end] = True
    if schema is None:
        schema = fit_schema(frame, keys["time"], is_train, args)
    numeric, categorical, observed = encode(frame, schema)  # no NaN in these
    return Table(schema=schema, numeric=numeric, categorical=categorical, observed=observed,
                 clock=time_features(keys["time"], schema.cycles, args), time=median_steps(keys),
                 keys=keys, time_columns=columns, pattern=pattern, kinds=kinds, seq_len=seq_len,
                 segments=segments, unlike=compare_groups(frame, keys))


def encode(frame, schema):
    """DataFrame of `read_cells` -> numeric (rows, N), categorical (rows, K), observed (rows, F): from here on
    no cell is NaN."""
    numeric = np.zeros((len(frame), len(schema.numeric)), np.float32)   # 0.0 where missing
    categorical = np.zeros((len(frame), len(schema.categorical)), np.int32)
    observed = frame.notna().to_numpy(copy=True)            # (rows, F): its columns are those, in that order
    for j, name in enumerate(schema.numeric):
        scaled = (frame[name] - schema.center[j]) / schema.scale[j]     # in float64, NaN where missing
        numeric[:, j] = scaled.clip(-1e9, 1e9).fillna(0.0)              # so that squares are finite
    for k, name in enumerate(schema.categorical):
        code = pd.Index(schema.vocabulary[k], dtype="str").get_indexer(frame[name])     # -1: not in train
        categorical[:, k] = np.where(frame[name].notna(), code + 2, NO_ID)          # -1 + 2 is UNK_ID
    return torch.from_numpy(numeric), torch.from_numpy(categorical), torch.from_numpy(observed)


def fit_schema(frame, stamps, is_train, args):
    """Scales, vocabularies and cycles, from the rows where is_train, (rows,) bool, is True alone."""
    numeric = frame.select_dtypes("number").columns.tolist()
    categorical = frame.columns.drop(numeric).tolist()
    schema = Schema(numeric, categorical, center=[], scale=[], vocabulary=[], learnt=[], cycles=[])
    for name in numeric:
        x = frame[name][is_train].dropna().to_numpy()       # a hole tells nothing about a scale
        schema.learnt.append(len(x) > 0)
        if len(x) == 0:
            x = np.zeros(1)                                 # center 0, scale 1: as good as any
        x = np.clip(x, *np.quantile(x, [0.001, 0.999]))     # one spike must not set the scale of all
        center = float(x.mean())
        scale = float(x.std())
        if scale <= 1e-9 * abs(center):                     # a constant's std is rounding
            scale = 1.0
        schema.center.append(center)
        schema.scale.append(scale)
    for name in categorical:
        # commonest first, so that id 2 is what one would guess without a model; then by name
        count = frame[name][is_train].value_counts().sort_index().sort_values(ascending=False, kind="stable")
        schema.vocabulary.append(count.index.tolist())
        schema.learnt.append(len(count) > 0)
    if hasattr(stamps, "dt"):                               # numbers of rows, for one, have no dates
        train = stamps[is_train]                            # of all groups
        seconds = (train.max() - train.min()).total_seconds()
        # a cycle that the train rows have not seen twice tells dates apart, and is learnt by heart
        schema.cycles = [cycle for cycle in args.cycles if seconds >= 2 * CYCLES[cycle]]
    return schema


def time_features(stamps, cycles, args):
    """Time stamps -> clock (rows, 2 * cycles) float32: sin and cos of the place in each cycle. They have no
    midnight at which they jump, as hours from 0 to 23 do."""
    clock = np.zeros((len(stamps), 2 * len(cycles)), np.float32)
    if cycles and not hasattr(stamps, "dt"):
        fail(f"{args.data}: no time stamps, which the checkpoint was trained with (--time_col)")
    for i, cycle in enumerate(cycles):
        midnight = pd.Timestamp("2000-01-01", tz=stamps.dt.tz)      # any: the place in a cycle counts
        angle = 2 * np.pi * (stamps - midnight).dt.total_seconds().fillna(0) / CYCLES[cycle]
        clock[:, i] = np.sin(angle)
        clock[:, len(cycles) + i] = np.cos(angle)
    return torch.from_numpy(clock)


def step_generator(*key):
    """A CPU generator seeded by a key such as (seed, step, rank). All that is random in a step comes from one
    of these, so resuming needs no saved state. SeedSequence hashes: neighbours have nothing in common."""
    seed = np.random.SeedSequence((len(key), *key)).generate_state(1)[0]    # or (1, 0) would be (1,)
    return torch.Generator().manual_seed(int(seed))


# ---- the rest can be skipped at first reading

def fail(message):
    """Bad input: one sentence on stderr, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)             # where argparse writes as well
    raise SystemExit(2)


def split_ends(n, what, args):
    """--split -> after how many of n rows (or groups) train, val and test end."""
    counts = args.split                                     # --split 8640 2880 2880: as they are
    if sum(args.split) <= 1 + 1e-6:                         # fractions; of a few groups none gets nothing
        counts = [max(1, round(n * share)) for share in args.split]
        counts[0] = max(1, round(n * sum(args.split)) - sum(counts[1:]))        # train is the rest
    if min(counts) < 1 or sum(counts) > n or any(count % 1 for count in counts):
        fail(f"{args.data}: --split {args.split} does not fit its {n} {what}, at least one for each part")
    return np.cumsum(counts).astype(int)


def split_rows(lengths, args, schema=None):
    """T and the segments of Table. lengths: rows of each group, in row order. One or two are split by time,
    each. As the ETTh1 protocol has it (Zhou 2021), a val or test window may begin up to T rows before its
    part. More groups are split by group, shuffled with a fixed seed."""
    end = np.cumsum(lengths)                                # of each group
    whole = torch.from_numpy(np.stack([end - lengths, end], axis=1))            # (groups, 2)
    if len(lengths) > 2:
        mixed = np.random.default_rng(0).permutation(len(lengths))      # in a file the last may be the newest
        ends = split_ends(len(lengths), "groups", args)
        parts = np.split(mixed, ends)                       # and the groups that --split leaves out
        train = whole[parts[0]]
        val = whole[parts[1]]
        test = whole[parts[2]]
    else:
        ends = np.array([[0, *split_ends(n, "rows", args)] for n in lengths])   # of a group's own parts
        ends = torch.from_numpy(ends) + whole[:, :1]                            # (groups, 4)
        train, val, test = ends.unfold(1, 2, 1).unbind(1)                       # neighbours of these
    seq_len = args.seq_len
    if not schema:                                          # a checkpoint has its own T
        seq_len = min(seq_len, int(train.diff(dim=1).max()))
    if len(lengths) <= 2:
        early = torch.tensor([seq_len, 0])                  # a start may move, an end may not
        val = torch.maximum(val - early, whole[:, :1])      # not into another group
        test = torch.maximum(test - early, whole[:, :1])
    return seq_len, {"train": train, "val": val, "test": test, "all": whole}


# ---- files, and the kinds of their columns

MONTH = r"(?i:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
DATE_LIKE = "|".join([
    r"^[12]\d{3}[-/](?:\d|[QW]\d)|^\d{4}Q\d$",                 # 2024-12-31, 2024/12, 2024-W05, 2024Q1
    r"^\d{4}\.\d{1,2}\.\d",                                     # 2024.12.31
    rf"^\d{{1,2}}[-/. ]+(?:\d{{1,2}}|{MONTH})[-/. ]+\d{{2}}",   # 31.12.24, 31. Dec 2024
    rf"^\d{{1,2}}/\d{{4}}$|^\d{{4}} {MONTH}$",                   # 12/2024, 2024 DEC
    rf"\b{MONTH}[-. ,]+(?:\d{{1,2}},? )?\d{{2}}(?:\d\d)?\b",    # Dec-24, Tuesday, Dec 31, 2024
    r"^(?:19|20)\d\d[01]\d[0-3]\d(?:[T: ]?\d{2,6}|\.0)?$",      # 20241231, 20241231 1030, 20241231.0
    r"^[0-3]\d[0-3]\d(?:19|20)\d\d$",                           # 31122024
    r"^\d{1,2}:\d\d|^\d+ days?\b"])                             # 10:30, 3 days
IF_NAMED = "|".join([                                           # only where the name says time:
    r"1\d{9}(?:\d{3})?(?:\.\d+)?|(?:19|20)\d\d[0-5]\d",        # since 1970; 202412 and 202452: a week
    r"(?:19|20)\d\d\.(?:0[1-9]|1[0-2])",                       # 2024.12
    r"(?:0[1-9]|1[0-2])\.(?:19|20)\d\d|\d\d[01]\d[0-3]\d"])     # 12.2024, 241231
NAMED_TIME = (r"(?i)(?:\b|_)(?:time|date|datum|epoch|year|month|unix|created|updated|yyyy)|stamp|zeit|"
              r"(?:\b|_)(?:week|period|ts|dt)\b")               # and no candidate or weekday
# 12, and numbers that pandas may not read: 1,205 and 1 205,7 and 2,4 and $12.50 and 29 °C
NUMBER = r"[$€£]?\s?[-+]?(?:\d{1,3}(?:[.,'\s]\d{3})+(?:[.,]\d+)?|\d*[.,]?\d+)\s?(?:%|°[CF]?)?"


def read_raw(args, **options):
    """A file as a DataFrame, by pandas; a simulation as it is. What cannot be read ends in one sentence."""
    if args.data in SIMULATIONS:
        return SIMULATIONS[args.data]()                     # the same in every run: the seed is fixed
    try:
        source = args.data
        if source.endswith(".parquet"):                     # is read as the .csv that pandas would write
            frame = pd.read_parquet(source)
            named = any(frame.index.names) or isinstance(frame.index, pd.DatetimeIndex)  # dates, likely
            text = frame.to_csv(index=named, sep=args.sep, decimal=args.decimal, lineterminator="\r\n")
            source = io.StringIO(text)
        return pd.read_csv(source, sep=args.sep, encoding=args.encoding, skiprows=args.skiprows,
                           skip_blank_lines=False, low_memory=False, **options)
    except FileNotFoundError:
        fail(f"{args.data}: no such file (--data takes a path or one of: {', '.join(SIMULATIONS)})")
    except Exception as e:      # foreign files raise anything: half a .gz, another encoding, no pyarrow ...
        why = f"{type(e).__name__}: {e}".splitlines()[0]
        fail(f"{args.data}: pandas cannot read this table ({why}); see --sep, --encoding and --skiprows")


def read_frame(args):
    """The table as a DataFrame of at least one row, NaN where nothing is: text, but for plain numbers."""
    if args.data in SIMULATIONS:
        return read_raw(args)
    words = {"keep_default_na": False, "na_values": [*MISSING, *args.na_values]}
    blank = rf"^\s*(?:{'|'.join(map(re.escape, MISSING))})\s*$"             # with blanks around
    head = read_raw(args, dtype=str, nrows=1000, **words).replace(blank, np.nan, regex=True)
    texts = [*args.time_col, args.group_col, *args.categorical_cols, *args.drop_cols]
    for name in head.columns.drop(texts, errors="ignore"):
        known = head[name].dropna()                         # whole numbers of one width: codes? None yet?
        is_plain = not known.str.fullmatch(r"\d\d+").all() or known.str.len().nunique() > 1
        if name.lower() in YMD or not is_plain or infer_kind(head[name], args) != "numeric":
            texts.append(name)
    frame = read_raw(args, dtype=dict.fromkeys(texts, str), decimal=args.decimal, thousands=args.thousands,
                     **words)
    frame = frame.replace(blank, np.nan, regex=True)
    if len(frame) == 0:                                     # a header alone
        fail(f"{args.data}: the table has no rows")
    marks = r"[;|\t]" if is_numeric_dtype(frame.iloc[:, 0]) else r"[;|\t]| (?!.*[;|\t])"
    found = re.search(marks, frame.columns[0])              # a name may have a blank, a number has none
    if frame.shape[1] == 1 and found:
        fail(f"{args.data}: one column {frame.columns[0]!r}: another separator? --sep {found[0]!r}")
    if not isinstance(head.index, pd.RangeIndex):           # pandas takes the first cells for names of rows
        fail(f"{args.data}: rows have more cells than the header: name each column, or leave out lines "
             "above it (--skiprows 0 1)")
    return frame


def read_cells(frame, kinds, args):
    """What is to be learnt: numbers as float64, categories as text, NaN where not; `kinds` gets odd words."""
    numeric = [name for name in kinds if kinds[name] == "numeric"]
    categorical = [name for name in kinds if kinds[name] == "categorical"]
    cells = pd.DataFrame(np.zeros((len(frame), len(numeric)), order="F"), frame.index, numeric)  # one block
    missing = pd.to_numeric(pd.Series(args.na_values, dtype=str), errors="coerce")
    for name in numeric:
        x = read_numbers(frame[name], args)
        odd = frame[name][x.isna()].dropna().astype(str)    # neither a number nor missing: "Bad"
        if len(odd) > 0.1 * frame[name].count() or odd.str.fullmatch(NUMBER).any():
            refuse_number(name, odd, args)
        if len(odd):
            kinds[name] = f"numeric, but for {len(odd)} cells such as {odd.iloc[0]!r}, which stay"
        x = x.where(x.abs() < SENTINEL)                     # in float32 -1.18e42 would be -inf
        cells.loc[:, name] = x.mask(x.isin(missing))        # -999 is -999.00 as well
    for name in categorical:
        cells[name] = frame[name].astype("string")
    return cells


def looks_like_time(column):
    """Do nine of ten of its values look like dates?"""
    words = column.dropna().iloc[:1000].astype(str).str.strip().drop_duplicates()  # enough to tell
    like = words.str.contains(DATE_LIKE)
    if re.search(NAMED_TIME, str(column.name)):             # 1,700,000,000 may be a price as well
        like |= words.str.fullmatch(IF_NAMED)
    return len(words) > 0 and like.mean() >= 0.9


def infer_kinds(frame, args):
    """{column: "time", "group", "numeric", "categorical" or "dropped: why"}. Flags win over inference."""
    kinds = dict.fromkeys(frame.columns)                    # None: not known yet
    for kind, names in (("dropped: --drop_cols", args.drop_cols), ("time", args.time_col),
                        ("group", [args.group_col]), ("numeric", args.numeric_cols),
                        ("categorical", args.categorical_cols)):
        for name in filter(None, names):                    # --group_col may be None
            if name not in kinds:
                fail(f"{args.data}: there is no column {name!r}; it has {', '.join(list(kinds)[:12])}")
            kinds[name] = kind
    parts = {name.lower(): name for name in kinds if name.lower() in YMD and not kinds[name]}
    for name in kinds:
        kinds[name] = kinds[name] or infer_kind(frame[name], args)  # a flag has said it, or its values
    if "time" not in kinds.values() and "year" in parts and {"month", "mo", "doy"} & parts.keys():
        kinds.update(dict.fromkeys(parts.values(), "time"))     # a year alone is a number
    if not {"numeric", "categorical"} & set(kinds.values()):
        fail(f"{args.data}: no usable column beside time and group")
    return kinds


def infer_kind(column, args):
    """The kind of a column that no flag speaks of."""
    words = column.dropna()
    if looks_like_time(words):
        return "dropped: a second time column" if args.time_col else "time"
    # 007 is no number, for it is not 7, but one 00 is dirt; a "Bad" among numbers is unknown
    is_code = not is_numeric_dtype(words) and words.str.fullmatch(r"0\d+").sum() > 0.01 * len(words)
    odd = words[read_numbers(words, args).isna()]
    if not is_code and len(odd) <= 0.1 * len(words):
        return "numeric"
    if not is_code and words.str.fullmatch(NUMBER).mean() > 0.5:
        refuse_number(column.name, odd, args)
    named = re.search(NAMED_TIME, str(column.name)) and not args.time_col   # such as Datum: 3. Mai 24
    if named and words.nunique() > len(words) / 2 and words.astype(str).str.contains(r"\d").mean() > 0.9:
        return "time"                                       # in a language of its own: will be refused
    if words.nunique() > MAX_CATEGORIES:                    # each would have a class and a vector of its own
        return f"dropped: over {MAX_CATEGORIES} distinct texts (--categorical_cols keeps it)"
    return "categorical"


def refuse_number(name, odd, args):
    """Refuse a column of numbers written otherwise, or with too many words among them."""
    fail(f"{args.data}: {len(odd):,} cells of {name!r} are no numbers (such as {odd.iloc[0]!r}): see "
         "--thousands and --decimal; --na_values; --categorical_cols or --drop_cols")


def read_numbers(column, args):
    """A column as float64, NaN where it is no number."""
    if not is_numeric_dtype(column):
        column = column.str.replace(args.thousands or "\0", "", regex=False)    # first: it may be a point
        column = column.str.translate(str.maketrans(args.decimal + ".", "." + args.decimal))
    return pd.to_numeric(column, errors="coerce").astype(np.float64)


# ---- time

warnings.filterwarnings("ignore", "Parsing dates|Initializing zero-element")    # days first; no numbers
YMD = {"year": "%Y", "month": "%m", "mo": "%m", "day": "%d", "dy": "%d", "doy": "%j",
       "hour": "%H", "hr": "%H", "minute": "%M", "second": "%S"}
# what pandas does not guess: years of two digits, months without a day, hours up to twelve or alone
OTHER_DATES = ["%d.%m.%y", "%y.%m.%d", "%m/%d/%y", "%d/%m/%y", "%y/%m/%d", "%d-%b-%y", "%d-%b-%Y",
               "%m/%d/%Y", "%d/%m/%Y", "%Y-%m-%d"]
OTHER_CLOCKS = ["", " %H", " %H:%M", " %H:%M:%S", " %H.%M", " %H.%M.%S", " %I:%M %p", " %I:%M:%S %p"]
OTHER_PATTERNS = [date + clock for date in OTHER_DATES for clock in OTHER_CLOCKS]
OTHER_PATTERNS += ["%m/%Y", "%m.%Y", "%Y.%m", "%b %Y", "%B %Y", "%b-%y", "%b-%Y", "%Y %b", "%Y%m%d%H",
                   "%Y%m", "%y%m%d", "%d%m%Y", "%m%d%Y"]
NUMBER_PATTERNS = {"s": r"1\d{9}(?:\.\d+)?", "ms": r"1\d{12}(?:\.\d+)?", "elapsed": r"\d+:\d\d(?::\d\d)?"}
# how others write what strftime writes: patterns to replace in its text
MANNERS = [("$^", ""), (r"(?<![\d:.])0+(\d)", r"\1"), (r"(?<![\d:])0+(\d)(?=[-/. ])", r"\1"),       # unpadded
           (r"\+0000$", "Z"), (r"([+-]\d\d)(\d\d)$", r"\1:\2"), ("UTC$", "GMT"),                    # zones
           (r"(\.\d{3})000(?=$| [+-])", r"\1"), (r"(\.\d{3})000\+0000$", r"\1Z"), (r"(\.\d)0{5}$", r"\1"),
           (r"(\.\d{6})$", r"\g<1>0"), ("$", ".0"),                                     # fractions
           ("[a-z]+", lambda found: found[0].upper())]                                  # 24-FEB


def parse_stamps(text, pattern):
    """Text as time stamps, missing where it does not read as this pattern."""
    if pattern in ("s", "ms"):
        return pd.to_datetime(pd.to_numeric(text, errors="coerce"), unit=pattern)  # in UTC
    if pattern == "elapsed":
        whole = text.where(text.str.count(":") == 2, text + ":00")  # 37:15 is 37 hours, not minutes
        return pd.to_timedelta(whole, errors="coerce").dt.total_seconds()
    several_zones = "%z" in pattern and text.str[-6:].nunique() > 1     # winter +01:00, summer +02:00
    try:
        stamps = pd.to_datetime(text, format=pattern, errors="coerce", utc=several_zones)
    except (ValueError, re.error) as e:
        fail(f"--time_format {pattern!r} is no pattern for these times ({e})")
    if "%y" in pattern:                                     # Jan-60 was 1960: nobody has measured the future
        stamps = stamps.mask(stamps.dt.year > pd.Timestamp.now().year, stamps - DateOffset(years=100))
    return stamps.mask(stamps.dt.year < 1000)               # 01012024 is no first of January, 101


def guess_patterns(words):
    """Patterns that may fit these words, a Series: by what all look like, or by the first and the last."""
    for pattern, looks in NUMBER_PATTERNS.items():
        if words.str.fullmatch(looks).all():
            return [pattern]
    guesses = list(OTHER_PATTERNS)                          # then what pandas makes of a word:
    for word in words.iloc[[0, -1]]:                        # one of them may be beyond the twelfth
        guesses += [guess_datetime_format(word), guess_datetime_format(word, dayfirst=True)]
    # nobody writes the year first and the month last, or points after the month first
    return [p for p in dict.fromkeys(guesses) if p and not re.match(r"%Y.%d|%m\.%d", p)]


def read_columns(frame, columns, args):
    """Columns, joined by a blank: the pattern that fits, or with the most even steps, or None; and stamps."""
    parts = [frame[name].astype("string").str.strip() for name in columns]  # such as Date and Time
    text = parts[0].str.cat(parts[1:], sep=" ")
    words = text.dropna()                                   # missing where one of its parts is
    if args.time_format:
        patterns = [args.time_format]                       # the user knows best
    elif len(columns) > 1 and {name.lower() for name in columns} <= YMD.keys():
        patterns = [" ".join(YMD[name.lower()] for name in columns)]
    else:
        patterns = guess_patterns(words)
    some = words.iloc[::1 + len(words) // 100]              # a quick look spares most of the patterns
    patterns = [p for p in patterns if parse_stamps(some, p).notna().mean() > 0.5]
    read = {}                                               # pattern -> stamps
    uneven = {}                                             # pattern -> share of its steps
    strange = words                                         # what the best of the others does not read
    for pattern in patterns:
        stamps = parse_stamps(text, pattern)
        unread = text[stamps.isna()].dropna()
        if len(unread):
            strange = min(strange, unread, key=len)
        else:
            steps = stamps.drop_duplicates().sort_values().diff().dropna().astype("int64")  # in any unit
            read[pattern] = stamps
            uneven[pattern] = ((steps / steps.median() - 1).abs() > 0.15).mean()    # months differ
    best = min(read, key=uneven.get, default=None)
    for pattern, stamps in read.items():                    # twelve days, or twelve months
        if uneven[pattern] == uneven[best] and not stamps.equals(read[best]):
            fail(f"{args.data}: {columns} reads as {best!r} and as {pattern!r}: which one? --time_format")
    return best, read.get(best), list(strange[:2])


def read_time(frame, kinds, args):
    """The time columns, their pattern (see Table), and stamps or numbers, a Series; or a refusal."""
    columns = args.time_col or [name for name in kinds if kinds[name] == "time"]  # in the file's order
    if (args.time_format or args.regular) and not columns:
        fail(f"{args.data}: no column looks like time, for --time_format or --regular: --time_col says which")
    if not columns:                                         # the number of the row; a blank row has none
        number = frame.index.to_series().astype(float)      # a row a step
        blank = frame.isna().all(axis=1) & (frame.shape[1] > 1)
        return [], "number", number.mask(blank)
    first = frame[columns[0]]
    numbers = read_numbers(first, args)
    is_number = numbers.count() == first.count() and not looks_like_time(first.rename("time"))
    if len(columns) == 1 and is_number and not args.time_format:
        return columns, "number", numbers.round(9)          # 20.099999999999998 is 20.1
    pattern, stamps, strange = read_columns(frame, columns, args)
    dates = [name for name in columns if name.lower() not in YMD and not frame[name].str.match(r"\d+:").any()]
    alone = frame[dates].nunique() > 0.9 * frame[dates].count()     # needs no clock beside it
    which = len(columns) > 1 and not args.time_col and alone.any()
    if pattern is None or which or pattern == "elapsed" and not stamps.is_monotonic_increasing:
        fail(f"{args.data}: {' '.join(columns)!r} does not read as times in one format (such as {strange}): "
             "--time_format '%d.%m.%Y %H:%M' says how, --time_col which, or both (Date Time); --skiprows "
             "1 if it is units; --drop_cols or --categorical_cols if it is no time")
    return columns, pattern, stamps


def time_step(stamps, every):
    """The step that leads from most stamps, a Series, to one of them: of working days, of months by their end
    or day, or the median; NaT where months are uneven. every: the stamps of all groups tell working days."""
    stamps = stamps.dropna().drop_duplicates().sort_values()
    median = stamps.diff().quantile(0.5, interpolation="lower")     # never between two steps
    if not hasattr(stamps, "dt") or len(stamps) < 3:
        return median
    days = median / pd.Timedelta(days=1)
    steps = [median]
    if 1 <= days < 7:
        dates = stamps if len(stamps) >= 100 else every.dropna()    # own ones, if they are enough
        dates = dates.dt.normalize().drop_duplicates().sort_values().iloc[-100:]
        count = np.bincount(dates.dt.day_of_week, minlength=7)      # of Mondays, Tuesdays ...
        is_open = count > 0.1 * count.max()                 # a Sunday among all Sundays may be an error
        if count.max() > 2 and not is_open.all():
            steps = [CustomBusinessDay(weekmask=tuple(is_open)), median]
    elif days > 27:
        months = round(days / 30.44)                        # 1, 3, 12 ...
        day = stamps.dt.day.mode().max()                    # 31: the last day of any month
        steps = [BMonthEnd(months), DateOffset(months=months, day=day), median]
    recent = stamps.iloc[-100:]
    fits = [recent.iloc[:-1].map(lambda stamp: stamp + step).isin(recent).mean() for step in steps]
    best = int(np.argmax(fits))                             # of equals the first
    if days > 27 and fits[best] < 0.8:
        return pd.NaT
    return steps[best]


def median_steps(keys):
    """(rows,) float64: when each row was, in median steps; its number where time does not tell."""
    seconds = keys["time"].ffill()                          # rows without a stamp come last
    if hasattr(seconds, "dt"):
        seconds = (seconds - seconds.min()).dt.total_seconds()
    steps = seconds.groupby(keys["group"]).diff()           # from row to row, never across groups
    step = steps[steps > 0].median()                        # NaN where all rows are of one time
    if not step > 0:
        return torch.arange(len(seconds)).double()
    return torch.from_numpy((seconds / step).to_numpy(np.float64, copy=True))


def even_keys(keys):
    """The different keys (group and time) of a table, and what they were if no step of time were absent."""
    known = keys.dropna().drop_duplicates().sort_values("time")
    every = []
    for name, own in known.groupby("group")["time"]:
        step = time_step(own, keys["time"])
        first = own.iloc[0]
        last = own.iloc[-1]
        # one stamp from 1970 would need all of memory for those that follow
        is_dense = step == step and last - first < 100 * len(own) * own.diff().median()
        if is_dense and isinstance(first, pd.Timestamp):
            own = pd.date_range(first, last, freq=step)     # what steps of this kind would be
        elif is_dense:
            own = np.linspace(first, last, 1 + round((last - first) / step)).round(9)
        every.append(pd.DataFrame({"group": name, "time": own}))
    return known, pd.concat(every)


def compare_groups(frame, keys):
    """{numeric column: how many times more it varies over all groups than in the calmest one}."""
    ratios = {}
    for name in frame.select_dtypes("number"):              # a column at a time: a large table fits once
        groups = frame[name].groupby(keys["group"].to_numpy())
        spread = groups.max() - groups.min()                # in float64: a small group is not rounded away
        ratios[name] = (frame[name].max() - frame[name].min()) / spread[spread > 0].min()
    return ratios


def insert_absent_rows(frame, keys, args):
    """--regular: the same with a row of holes at the end for each step of time that is not there."""
    known, every = even_keys(keys)
    absent = pd.concat([every, known, known]).drop_duplicates(keep=False)       # what is there once
    if len(known) + len(absent) > len(every):
        fail(f"{args.data}: --regular: steps of time are uneven: none is known to be absent")
    keys = pd.concat([keys, absent], ignore_index=True)     # numbered on from the last row
    return frame.reindex(keys.index), keys                  # rows that are not there are NaN


# ---- and back: the user's own file as it was, with some cells of our own

def check_target(flag, path, *others):
    """Before minutes of training: can a result be written to `path`, if there is one, without harm?"""
    if path is None:
        return
    folder = os.path.dirname(path) or "."                   # a file beside is renamed: it must allow that
    writable = os.access(folder, os.W_OK) and not os.path.isdir(path)
    taken = [os.path.realpath(other) for other in others if other]  # ./a.csv is a.csv
    if os.path.realpath(path) in taken or not writable or not path.endswith((".csv", ".csv.gz")):
        fail(f"{flag} {path} must be a .csv or .csv.gz of its own, in a folder of yours")


def replace_file(path, write):
    """Write beside the file, then rename: whoever kills us finds the old file or the new one, never half."""
    folder, name = os.path.split(path)
    beside = os.path.join(folder, f"tmp.{name}")            # ends as the file: pandas compresses a .gz
    try:
        os.makedirs(folder or ".", exist_ok=True)
        write(beside)
        os.replace(beside, path)                            # on one disk this happens whole or not at all
    except (OSError, RuntimeError, ValueError) as e:        # torch on a full disk; another encoding
        if os.path.exists(beside):
            os.remove(beside)                               # half a file helps nobody
        fail(f"{path} cannot be written ({str(e).splitlines()[0]}); what was there before is kept")


def read_text(table, args):
    """The file as a DataFrame of text, "" where empty; --regular: by time, with the rows that were absent."""
    for name, ratio in table.unlike.items():
        if ratio > 1000:                                    # the small ones would drown
            fail(f"{args.data}: {name!r} varies a thousand times more than in some group: give each a file")
    text = read_raw(args, dtype=str, keep_default_na=False).astype("string").fillna("")
    text.columns = list(table.kinds)                        # as the Table calls them
    if args.regular:
        absent = table.keys[table.keys.index >= len(text)]
        text = pd.concat([text, new_rows(table, text, absent, args)]).iloc[table.keys.index]
        table.keys = table.keys.reset_index(drop=True)      # from here on that is the file
    return text


def own_numbers(table, stride=1):
    """The numeric columns of every so many rows, a DataFrame in own units, NaN where there is no value."""
    schema = table.schema
    numbers = pd.DataFrame(table.numeric[::stride].numpy(), columns=schema.numeric) * schema.scale
    numbers = numbers.where(table.observed[::stride, :numbers.shape[1]].numpy()) + schema.center
    return numbers.mask(numbers.abs() < 1e-6 * np.array(schema.scale), 0.0)     # 0, but for float32


def number_text(x, own, args):
    """Numbers (n,) as n texts in the manner of `own`, a Series of text: its decimals, whole where it is."""
    decimals = own.str.extract(rf"{re.escape(args.decimal)}(\d+)(?:[eE].*)?$", expand=False).fillna("")
    digits = min(15, int(decimals.str.len().quantile(0.95)))            # one 20.400000000000002 is no manner
    form = f".{digits}e"
    if own.str.contains("e", case=False).mean() < 0.5:
        whole = decimals.str.strip("0").eq("").all()        # 3 and 3.00, never 3.25
        x = np.round(x, 0 if whole else digits) + 0.0       # no -0.0
        form = f".{digits}f"
    return [format(value, form).replace(".", args.decimal) for value in x]


def write_cells(target, rows, name, said, table, text, args, forecast=False):
    """Write the cells of a column into these rows of `target`, a DataFrame of text; return them as lines of
    --intervals. said (4, n): values, low ends, high ends and probabilities, see model.Prediction.interval.
    Numbers are within what the column was (a forecast: not below 0 where it never is), in its manner."""
    schema = table.schema
    there = target[name].iloc[rows].str.strip()
    # missing, or a number that stands for it; a word among numbers stays
    is_hole = there.isin([*MISSING, *args.na_values]) | read_numbers(there, args).notna()
    holes = np.flatnonzero(is_hole)
    rows = np.asarray(rows)[holes]
    said = said[:, holes]
    if name in schema.categorical:
        words = ["", "", *schema.vocabulary[schema.categorical.index(name)]]    # by their ids
        cells = np.array(words, dtype=object)[said[:3].long().numpy()]      # (3, n), as all here
    else:
        j = schema.numeric.index(name)
        own = text[name].iloc[table.keys.index[table.observed[:, j].numpy()]].str.strip()   # of all rows
        x = said[:3].double().numpy() * schema.scale[j] + schema.center[j]      # in own units
        numbers = read_numbers(own, args)
        if not forecast:
            x = x.clip(numbers.min(), numbers.max())
        elif numbers.min() >= 0:
            x = x.clip(0.0)
        cells = [number_text(values, own, args) for values in x]
    target.iloc[rows, target.columns.get_loc(name)] = cells[0]
    return pd.DataFrame({"row": rows, "column": name, "value": cells[0], "low": cells[1], "high": cells[2],
                         "probability": said[3].numpy().round(3)})


def stamp_text(stamps, pattern, manner):
    """Stamps, a Series, as a Series of text."""
    if pattern in ("s", "ms"):
        text = ((stamps - pd.Timestamp(0)) // pd.Timedelta(1, pattern)).astype(str)
    elif pattern == "elapsed":
        text = stamps.astype(str)
    else:
        text = stamps.dt.strftime(pattern)
    return text.str.replace(*manner, regex=True)


def new_rows(table, text, keys, args):
    """Rows of text with the group and the time alone, those of `keys` (see Table), as the file has them."""
    rows = pd.DataFrame("", keys.index, text.columns)
    known = table.keys[table.keys.index < len(text)].dropna()   # rows of the file, not those of --regular
    if args.group_col:
        rows[args.group_col] = keys["group"]
    directives = iter(table.pattern.split(" "))
    for name in table.time_columns:
        own = text[name].iloc[known.index].str.strip().set_axis(known.index)    # as the file writes them
        if table.pattern == "number":
            rows[name] = number_text(keys["time"].to_numpy(np.float64), own, args)
            break
        pattern = " ".join(islice(directives, 1 + own.iloc[0].count(" ")))      # 10:30 PM has two
        fitting = [manner for manner in MANNERS if (stamp_text(known["time"], pattern, manner) == own).all()]
        if not fitting:
            fail(f"{args.data}: {name} is read as {pattern!r} and cannot be written so (such as "
                 f"{own.iloc[-1]!r}): --forecast and --regular need plainer times")
        rows[name] = stamp_text(keys["time"], pattern, fitting[0])
    return rows


def next_rows(table, text, steps, args):
    """The `steps` rows that come next in each sequence, see new_rows; their clock (sequences, steps, C)."""
    coming = []
    groups = table.keys["time"].groupby(table.keys["group"])
    longest = max((own for _, own in groups), key=len)      # tells the step of those of a few rows
    for name, own in groups:
        step = time_step(own if len(own) > 3 else longest, table.keys["time"])
        if step != step or own.nunique() <= len(own) / 2:
            fail(f"{args.data}: --forecast cannot go on from {' '.join(table.time_columns)!r}, whose step is "
                 f"{step}: uneven months? Which column tells sequences (--group_col) or hours (--time_col)?")
        stamps = [own.iloc[-1] + step * (ahead + 1) for ahead in range(steps)]  # months differ in length
        coming.append(pd.DataFrame({"group": name, "time": stamps}))
    keys = pd.concat(coming, ignore_index=True)             # sequence after sequence
    clock = time_features(keys["time"], table.schema.cycles, args)
    return new_rows(table, text, keys, args), clock.unflatten(0, (-1, steps))


def write_text(path, text, lines, args):
    """A DataFrame of text as the file is written, and the lines of --intervals, DataFrames."""
    options = {"index": False, "sep": args.sep, "encoding": args.encoding}
    if args.data not in SIMULATIONS:                        # pandas renames columns called alike or nothing
        header = read_raw(args, header=None, nrows=1, dtype=str, keep_default_na=False)
        options["header"] = header.iloc[0].tolist()
    if any(text[name].str.contains("\r").any() for name in text):
        options["quoting"] = csv.QUOTE_ALL                  # pandas quotes \n alone
    replace_file(path, lambda beside: text.to_csv(beside, **options))
    if args.intervals:
        lines = pd.concat([pd.DataFrame(), *lines])         # there may be none
        replace_file(args.intervals, lambda beside: lines.to_csv(beside, index=False))
    print("wrote", path, args.intervals or "")


# ---- two simulated tables, and a tiny one

def simulate_sensors(n_rows=40_000, seed=0):
    """A pump station at one reading a second, by the affinity laws of pumps (flow ~ speed, head ~ speed^2,
    power ~ speed^3), first-order lags for heat and Markov switching between modes; see spoil."""
    rng = np.random.default_rng(seed)
    t = np.arange(n_rows)                                   # (rows,), seconds

    def lagged(x, tau):             # what a thermometer in a thick pipe reads
        return pd.Series(x).ewm(alpha=1 - np.exp(-1 / tau), adjust=False).mean().to_numpy()

    def noise(scale, tau=0.01):     # of this standard deviation; forgets itself over tau rows, 0.01: at once
        decay = np.exp(-1 / tau)                            # what is left of it a row later
        white = rng.standard_normal(n_rows + int(8 * tau))  # longer: a lag starts from rest
        return scale * np.sqrt((1 + decay) / (1 - decay)) * lagged(white, tau)[-n_rows:]

    # a mode lasts five minutes on average, a set-point two; both jump
    modes = np.array(["idle", "production", "boost", "flush"])
    follows = np.array([[0, .8, .1, .1], [.4, 0, .4, .2], [.1, .9, 0, 0], [.6, .4, 0, 0]])
    path = [1]                                              # it starts in production
    while len(path) < n_rows // 50:
        path.append(rng.choice(4, p=follows[path[-1]]))
    mode = np.repeat(path, rng.geometric(1 / 300, len(path)))[:n_rows]
    trim = np.repeat(rng.normal(0, 60, n_rows), rng.geometric(1 / 120, n_rows))[:n_rows]
    setpoint = np.round(np.array([400, 1450, 1900, 1100])[mode] + trim, -1)                 # rpm
    valve = np.array([0.25, 0.7, 0.9, 1.0])[mode]
    speed = lagged(setpoint, 6.0) + noise(35, 5.0)          # rpm
    opening = lagged(valve, 15.0) * (1 + noise(0.05, 8.0))  # 0 to 1
    flow = 0.06 * speed * opening                               # m3/h
    suction = 2.4 + noise(0.15, 300.0) - 0.004 * flow           # bar
    head = 5.2 * (speed / 1500) ** 2 - 0.00022 * flow ** 2  # bar
    power = 1.5 + 0.045 * flow * head + 6.0 * (speed / 1500) ** 3       # kW: idling, pumping, friction
    ambient = 18 + 5 * np.sin(2 * np.pi * (t / 86_400 - 0.3)) + noise(0.3, 600.0)           # degrees
    rough = np.array([0.4, 1.0, 1.3, 2.2])[mode] * (speed / 1500) ** 2                      # mm/s
    frame = pd.DataFrame({
        "time": pd.Timestamp("2024-03-04 05:00:00") + pd.to_timedelta(t, unit="s"),
        "mode": modes[mode],
        "valve": np.select([opening > 0.8, opening > 0.4], ["open", "throttled"], "closed"),
        "speed_setpoint": setpoint,
        "speed": np.round(speed + noise(4), 0),             # each sensor has a noise and a resolution
        "flow": np.round(flow + noise(0.8), 1),
        "pressure_in": np.round(suction + noise(0.02), 3),
        "pressure_out": np.round(suction + head + noise(0.04), 2),
        "power": np.round(power * (1 + noise(0.012)), 2),
        "temp_bearing": np.round(ambient + 1.6 * lagged(power, 120.0) + noise(0.15), 1),
        "temp_outlet": np.round(ambient + 0.5 * lagged(power, 40.0) + 6 + noise(0.1), 1),
        "vibration": np.round(rough * np.exp(noise(0.1) + noise(0.2, 20.0)), 3),
        "temp_ambient": np.round(ambient + noise(0.1), 1),
        "line_frequency": 50.0,                             # never moves
        "humidity": np.nan})                                # was never connected
    return spoil(frame, rng)


def spoil(frame, rng):
    """The same DataFrame with what goes wrong on site: single dropouts and holes in runs, a frozen sensor,
    spikes, a sentinel, a category that appears late."""
    n_rows = len(frame)
    for name in frame.columns.drop(["time", "line_frequency", "humidity"]):
        holes = rng.random(n_rows) < 0.005                  # dropouts
        for start in rng.integers(0, n_rows, n_rows // 2000):
            holes[start:start + rng.geometric(1 / 90)] = True           # a minute and a half on average
        frame[name] = frame[name].mask(holes)
    for start in rng.integers(0, n_rows, 12):                   # a frozen sensor repeats its last value
        frame.loc[start:start + rng.geometric(1 / 180), "temp_outlet"] = frame.at[start, "temp_outlet"]
    spikes = rng.random(n_rows) < 0.0002                    # a spike spoils a mean
    frame.loc[spikes, "pressure_out"] = 40 * rng.random(spikes.sum())           # water hammer
    frame.loc[rng.integers(0, n_rows, 15), "flow"] = -1.18e42           # how a logger says "no reading"
    frame.loc[int(0.93 * n_rows):int(0.94 * n_rows), "mode"] = "maintenance"    # never seen in the train rows
    return frame


def simulate_planets(n_systems=3000, seed=0):
    """Two to five planets on Kepler's ellipses round a star, one sequence of 30 to 59 rows a system, each
    with its own step size. x, y: place; m (1e-5 stars), a, e (times 20): mass, semi-major axis, eccentricity,
    missing where no planet is. acceleration_x (_y) says whether the planets' x (y) add up to more than 0."""
    rng = np.random.default_rng(seed)
    n = n_systems
    rows = rng.integers(30, 60, n)                          # of each sequence
    count = rng.integers(2, 6, n)                           # planets of each system
    here = np.arange(5)[:, None] < count                        # (5, systems), True = this planet exists
    rank = np.where(here, rng.random((5, n)), 2).argsort(axis=0).argsort(axis=0)        # from the star
    a = 1 + rank * (rng.uniform(1.5, 3, n) - 1) / (count - 1)       # evenly spaced
    m = rng.uniform(1, 5, (5, n))                           # too small to pull at each other
    e = rng.uniform(0, 0.1, (5, n))
    start = rng.uniform(0, 2 * np.pi, (5, n)) * (rng.random(n) >= 0.3)                  # 30 %: all at +x
    system = np.repeat(np.arange(n), rows)                      # of each row of the table
    frame = pd.DataFrame({"idx": system})
    frame["time_step"] = frame.groupby("idx").cumcount()
    step = rng.uniform(15, 24, n) / (rows - 1)                  # a planet at distance 1 goes round in 2 pi
    time = step[system] * frame["time_step"].to_numpy()     # of each row, not in the table
    mean = start[:, system] + time * np.sqrt((1 + 1e-5 * m) / a ** 3)[:, system]    # (5, rows), as all below
    a = a[:, system]
    e = e[:, system]
    angle = mean                                            # Kepler's equation: angle - e sin(angle) = mean
    for _ in range(5):                                          # by Newton's method
        angle = angle - (angle - e * np.sin(angle) - mean) / (1 - e * np.cos(angle))
    x = a * (np.cos(angle) - e)
    y = a * np.sqrt(1 - e ** 2) * np.sin(angle)
    for i in range(5):
        for name, values in zip("xymae", [x, y, m[:, system], a, 20 * e]):
            frame[f"planet{i}_{name}"] = np.where(here[i, system], values[i], np.nan)
    frame["total_mass"] = frame.filter(regex="planet._m").sum(axis=1)
    frame["n_planets"] = pd.Series(count[system]).astype(str) + "_planets"
    for name in "xy":
        total = frame.filter(regex=f"planet._{name}").sum(axis=1)
        frame[f"acceleration_{name}"] = np.where(total > 0, "increasing", "decreasing")
    return frame


def tiny_table():
    """Ten rows that fit on a screen: two rooms, two numeric columns, one category, a few holes."""
    return pd.DataFrame({
        "room": list("aaaaaabbbb"),
        "celsius": [20.0, 21.0, None, 23.0, 22.0, 21.5, 17.0, 17.5, 18.5, None],
        "humidity": [40.0, 42.0, 43.0, None, None, 44.0, 55.0, 54.0, None, 51.0],
        "door": ["shut", "shut", "open", "open", None, "shut", "open", "open", "shut", "shut"]})


SIMULATIONS = {"sensors": simulate_sensors, "planets": simulate_planets}
GROUPS = {"planets": "idx"}             # the group column of a simulation, where it has one


# ---- errors: sums first, means at the end

def add_errors(lines, kind, case, schema, targets, answers):
    """Append a DataFrame for each method, answers {name: (numbers, ids)}: the summed errors of each column in
    scaled units, over the scored cells. A wrong category counts 1; no guess is the commonest, id 2."""
    for method, (numbers, ids) in answers.items():
        wrong = ids.clamp(min=2) != targets.categorical     # (B, T, K)
        error = torch.cat([numbers - targets.numeric, wrong], dim=-1)           # (B, T, F)
        error = torch.where(targets.score, error, 0.0).double()     # sums of many
        lines.append(pd.DataFrame({
            "kind": kind, "case": case, "method": method,
            "column": schema.numeric + schema.categorical,
            "count": targets.score.sum(dim=(0, 1)),
            "absolute": error.abs().sum(dim=(0, 1)),
            "square": error.square().sum(dim=(0, 1))}))


def mean_errors(errors, columns, measure, by):
    """A line a method: means over the scored cells of these columns, for each value of `by`; NaN of none."""
    chosen = errors[errors["column"].isin(columns)]
    sums = chosen.groupby(["method", by])[[measure, "count"]].sum()     # over batches and columns
    means = (sums[measure] / sums["count"]).unstack(by)     # divided once: each cell weighs the same
    return means.reindex(index=errors["method"].unique(), columns=errors[by].unique())


def print_table(title, means):
    if means.notna().any(axis=None):                        # no categories, no table
        means = means.rename_axis(index=None, columns=None)         # their names would take a line
        print(f"\n{title}\n{means.to_string(float_format='{:.4g}'.format, na_rep='-')}")


def print_errors(title, errors, schema, cases=None):
    """Tables of numbers and of categories: some cases (None: each), and the mean of all. Returns {method:
    {measure: [a mean for each case]}}."""
    mse = mean_errors(errors, schema.numeric, "square", "case")
    mae = mean_errors(errors, schema.numeric, "absolute", "case")
    accuracy = 1 - mean_errors(errors, schema.categorical, "absolute", "case")
    for means, heading in ((mse, "mean squared error, scaled"), (accuracy, "accuracy of categories")):
        print_table(f"{title}: {heading}", means[cases or list(means)].assign(mean=means.mean(axis=1)))
    kept = pd.concat({"mse": mse, "mae": mae, "accuracy": accuracy})    # a line a measure and method
    kept = kept.astype(object).where(kept.notna(), None)                # for results.json: it knows no NaN
    return {method: kept.xs(method, level=1).T.to_dict("list") for method in mse.index}


def own_errors(errors, schema):
    """A line a column: its mean absolute error in its own units; of a category the share that is wrong."""
    means = mean_errors(errors, schema.numeric + schema.categorical, "absolute", "column").T
    scale = pd.Series(schema.scale, schema.numeric).reindex(means.index, fill_value=1.0)  # categories
    return means.mul(scale, axis=0)


# ---- pictures

COLORS = {"seen": "black", "truth": "black", "model": "#0072B2", "linear": "#E69F00", "last": "#009E73",
          "season": "#CC79A7", "mean": "#999999", "gauss": "#D55E00", "ar": "#D55E00", "val": "#0072B2",
          "train": "#999999"}               # for the eyes of all (Okabe 2008)
MARKS = {"seen": ".", "truth": "o"}         # the rest is crosses: a line would claim to know what is between


def new_figure(path, lines, columns, size):
    """matplotlib's Figure and its axes, (n,); None and no axes where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure                # and not pyplot: files, no window
    except ImportError:
        print(f"no {path} without matplotlib: pip install matplotlib")
        return None, []
    figure = Figure(figsize=size, layout="constrained")     # makes room for labels
    return figure, figure.subplots(lines, columns, squeeze=False).flatten()


def draw_lines(path, frame, xlabel, ylabel):
    """A line for each column of a frame over its index, on a logarithmic scale: errors differ by factors."""
    figure, axes = new_figure(path, 1, 1, (7, 4))
    for axis in axes:
        frame.astype(float).plot(ax=axis, logy=True, marker=".", color=COLORS, xlabel=xlabel, ylabel=ylabel)
        figure.savefig(path, dpi=120)


def draw_windows(path, schema, batch, asked, guesses, band):
    """Windows of a Batch in own units: what was seen, what was asked (B, T, F), guesses {method: (B, T, N)},
    the model's band from low to high, (2, B, T, N). Columns called _x and _y are drawn in the plane, without
    it; else the four columns of window 0 over rows that move and were asked for most."""
    names = schema.numeric                                  # categories are not drawn
    scale = torch.tensor(schema.scale)
    center = torch.tensor(schema.center)
    rows = torch.arange(batch.numeric.shape[1])
    observed = batch.observed[..., :len(names)]
    asked = asked[..., :len(names)] & observed              # what has no truth is not drawn
    across = [j for j, name in enumerate(names) if name.endswith("_x") and name[:-1] + "y" in names]
    up = [names.index(names[j][:-1] + "y") for j in across]
    if up:                                                  # the rivals would hide the orbits
        guesses = {"model": guesses["model"]}
        panels = [(b, across, up) for b in range(len(asked))]       # a window each, with all its planets
        figure, axes = new_figure(path, 1, len(panels), (9, 3.2))
    else:
        moves = np.ptp(batch.numeric[0].numpy(), axis=0) * asked[0].numpy().sum(axis=0)     # (N,)
        panels = [(0, -1, j) for j in (-moves).argsort()[:4]]       # -1: over the row, the last column below
        figure, axes = new_figure(path, max(1, len(panels)), 1, (9, 1 + 1.7 * len(panels)))
    layers = {"seen": batch.numeric.masked_fill(asked | ~observed, np.nan)}     # NaN is not drawn
    for method, numbers in {"truth": batch.numeric, **guesses}.items():
        layers[method] = numbers.masked_fill(~asked, np.nan)        # where it was asked
    for axis, (b, x, y) in zip(axes, panels):
        for method, numbers in layers.items():
            own = torch.column_stack([numbers[b] * scale + center, rows])       # (T, N + 1)
            axis.plot(own[:, x].flatten(), own[:, y].flatten(), MARKS.get(method, "x"), label=method,
                      color=COLORS[method], ms=5, mfc="none")
        if up:
            axis.set(aspect="equal")                        # a circle looks like one
        else:
            low, high = band[:, b, :, y] * scale[y] + center[y]
            axis.fill_between(rows, low, high, asked[b, :, y], color=COLORS["model"], alpha=0.2)
            axis.set(ylabel=names[y].replace("$", r"\$"))                       # no TeX
    if figure:
        figure.legend(*axes[0].get_legend_handles_labels(), ncols=6, loc="outside upper left")
        figure.savefig(path, dpi=120)


# ---- flags

def number(kind, low, high=2.0 ** 53, inside=False):
    """An argparse type: an int or a float from low to high (inside: without the ends)."""
    def number(text):                                       # "invalid number value: 'x'", says argparse
        value = kind(text)
        if not low <= value <= high or inside and value in (low, high):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    return number


def make_parser(doc, script, source):
    """A parser with the flags that say what the table is, for this file and the two training scripts."""
    # no config files: `--help` is the documentation, and a misspelt flag is an error
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Defaults in the help of each flag, and the docstring as it stands."""
    parser = argparse.ArgumentParser(description=doc, usage=f"python {script}.py [--flag value ...]",
                                     formatter_class=Formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--data", default=source, help=f".csv, .csv.gz, .parquet, or simulated: {', '.join(SIMULATIONS)}")
    tab = lambda text: text.replace("\\t", "\t")            # shells pass two characters
    add("--sep", type=tab, choices=list(",;\t| "), default=",", help="between cells")
    add("--decimal", choices=[".", ","], default=".", help="point or comma")
    add("--thousands", choices=[",", ".", " ", "'"], help="between groups of three digits")
    add("--encoding", default="utf-8", help="of a .csv")
    add("--skiprows", type=int, nargs="+", help="lines to leave out; the first is 0")
    add("--na_values", nargs="+", default=[], help="more words for a missing cell")
    add("--time_col", nargs="+", default=[], help="to sort by; several are joined: Date Time")
    add("--time_format", help="such as '%%d.%%m.%%Y %%H:%%M' (None: found out)")
    add("--regular", action="store_true", help="a row of holes for each step that is absent")
    add("--cycles", nargs="*", choices=CYCLES, default=list(CYCLES), help="hands of the clock")
    add("--group_col", help="its values are separate sequences; no window crosses over")
    add("--numeric_cols", nargs="+", default=[], help="columns to read as numbers")
    add("--categorical_cols", nargs="+", default=[], help="columns to read as categories")
    add("--drop_cols", nargs="+", default=[], help="columns to leave out")
    add("--split", type=number(float, 0), nargs=3, default=[0.7, 0.15, 0.15],
        help="train, val, test: fractions, or counts of rows in order of time (of groups, shuffled)")
    add("--clip", type=number(float, 0, inside=True), default=10.0,
        help="what enters the network is cut to +- this, and nothing beyond is asked for")
    add("--seq_len", type=number(int, 1), default=96, help="T, rows of a window")
    return parser


def add_loop_flags(add, script, max_steps):
    """The flags of the model, of its optimisation and of the run, for the training scripts."""
    positive = number(float, 0)
    count = number(int, 0)                                  # whole numbers from 0
    size = number(int, 1)
    add("--n_layer", type=size, default=4, help="transformer blocks")
    add("--n_head", type=size, default=4, help="attention heads")
    add("--n_embd", type=size, default=128, help="width of the residual stream")
    add("--dropout", type=number(float, 0, 1), default=0.0, help="while training")
    add("--batch_size", type=size, default=32, help="windows in a forward pass")
    add("--grad_accum", type=size, default=1, help="forward passes in a step")
    add("--max_steps", type=count, default=max_steps, help="optimiser steps")
    add("--lr", type=positive, default=2e-3, help="peak learning rate of AdamW")
    add("--min_lr", type=positive, default=5e-5, help="learning rate at the end")
    add("--warmup_steps", type=count, default=100, help="linear warmup")
    add("--weight_decay", type=positive, default=0.1, help="of matrices alone")
    add("--grad_clip", type=positive, default=1.0, help="largest gradient norm")
    add("--loss", choices=["mse", "huber"], default="mse", help="of numeric cells")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda if there is one")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of autocast; auto: bfloat16 on a GPU that has it")
    add("--compile", action="store_true", help="a wait, then faster on a GPU")
    add("--seed", type=count, default=0, help="of weights, batches and masks")
    add("--eval_every", type=size, default=100, help="steps between evaluations and saves")
    add("--eval_stride", type=size, help="rows between test windows (None: seq_len // 4)")
    add("--intervals", metavar="FILE", help="a .csv: how sure is each cell that is written?")
    add("--coverage", type=number(float, 0, 1, inside=True), default=0.9, help="of intervals")
    add("--log_every", type=size, default=10, help="steps between log lines")
    add("--out_dir", default=f"out/{script}", help="for checkpoints, tables and pictures")
    add("--resume", action="store_true", help="go on from out_dir/last.pt, with its flags")


def parse(parser, argv, script):
    """Flags, and the checkpoint to go on from, or None. On --resume its flags become the defaults."""
    args = parser.parse_args(argv)                          # argv None: the command line
    checkpoint = None
    if args.resume:
        checkpoint = load_checkpoint(f"{args.out_dir}/last.pt", script)     # not best.pt: the run goes on
        kept = {**checkpoint["args"], "out_dir": args.out_dir}                  # it may have been moved
        parser.set_defaults(**kept)
        args = parser.parse_args(argv)                      # a flag given now still wins
    if args.n_embd % (2 * args.n_head):                     # rotary turns the channels of a head in pairs
        fail(f"--n_embd {args.n_embd} must be --n_head {args.n_head} times an even number")
    return args, checkpoint


def load_checkpoint(path, script):
    """Only tensors and plain Python are read (weights_only), so a checkpoint cannot run code."""
    if not os.path.exists(path):
        fail(f"{path}: no such checkpoint; --resume goes on from a run with the same --out_dir")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)    # where there is no GPU, too
        assert checkpoint["script"] == script               # of the other objective it is of no use
        return checkpoint
    except Exception:               # half a file and a foreign one raise half a dozen kinds of error
        fail(f"{path}: cannot be read as a checkpoint of {script}.py")


def pick_device(args):
    """Returns the device and autocast's dtype. A GPU is used where there is one, never required."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":                                      # each process of torchrun has its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name).item()                  # asking is the only way to know
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {args.device} cannot be used here ({str(e).splitlines()[0]})")
    dtype = args.dtype
    if dtype == "auto":
        on_gpu = name.startswith("cuda") and torch.cuda.is_bf16_supported()     # a CPU seldom gains
        dtype = "bfloat16" if on_gpu else "float32"
    return torch.device(name), getattr(torch, dtype)


# ---- what this file prints when run by itself

def tiny_batch():
    """The tiny table as a Table, scaled by two rows of each room, and all of it as one Batch: what this file,
    masking.py and model.py print."""
    args = make_parser(None, "data", "tiny").parse_args("--group_col room --seq_len 2 --split 2 1 1".split())
    table = load_table(args, tiny_table())
    table.seq_len = 6                                       # a window holds a room
    return table, table.batch(table.starts("all", 6))


def show(schema, batch):
    """A Batch as text, a block a window: "?" where `observed` is False, "pad" beyond `valid`."""
    blocks = []
    for b, valid in enumerate(batch.valid):
        cells = torch.cat([batch.numeric[b], batch.categorical[b]], dim=-1).numpy()     # (T, F)
        text = pd.DataFrame(cells, columns=schema.numeric + schema.categorical).map("{:.3g}".format)
        text = text.where(batch.observed[b].numpy(), "?")
        text[~valid.numpy()] = "pad"
        blocks.append(f"window {b}\n{text.to_string()}")
    return "\n".join(blocks)


def hole_runs(table):
    """For each column the number of holes in the train rows, and of runs of them, two (F,)."""
    sequences = []
    for start, end in table.segments["train"].tolist():
        hole = (~table.observed[start:end]).char()
        sequences.append(torch.nn.functional.pad(hole, (0, 0, 1, 0)))   # a row without holes before each
    hole = torch.cat(sequences)                             # (rows + S, F), 1 = a hole
    return hole.sum(dim=0), (hole.diff(dim=0) > 0).sum(dim=0)   # a run begins where 1 follows 0


def default_span(table):
    """Mean rows of a run of holes in the train rows, at most T / 4; 12 where there are too few to tell."""
    learnt = torch.tensor(table.schema.learnt)              # a column without values has no runs
    holes, runs = hole_runs(table)
    holes = int(holes[learnt].sum())
    runs = int(runs[learnt].sum())
    span = 12.0 if runs < 20 else holes / runs              # a few runs say little
    return max(1.0, min(span, table.seq_len / 4))


def absent_steps(table):
    """How many steps of time have no row, and how many rows have the stamp of another."""
    if not table.time_columns:
        return 0, 0
    known, every = even_keys(table.keys)                    # what is there, and what would be
    return max(0, len(every) - len(known)), table.keys["time"].count() - len(known)


def find_hints(table, args):
    """What the table may be that it was not taken for: at most three sentences, each with the flag."""
    schema = table.schema
    hints = []
    absent, repeated = absent_steps(table)
    if repeated >= len(table.observed) / 2 and not args.group_col:
        label = [*schema.categorical, "NAME"][0]            # may say which sequence a row is of
        hints.append(f"the same stamps again and again: a long file (--group_col {label}, or pivot it), or "
                     "an hour of its own (--time_col Date Hour)?")
    for name in schema.numeric:
        if re.search(NAMED_TIME, name) and not table.time_columns and not args.group_col:
            hints.append(f"{name} is taken for a number: is it the time? --time_col {name}")
    numbers = own_numbers(table, 1 + len(table.observed) // 100_000)    # 100,000 rows tell
    for edge in (numbers.min(), numbers.max()):             # of each column
        off = (numbers - edge).abs()                        # how far each value is from the edge
        others = off[off > 1e-6]                            # NaN at the edge itself
        far = (2 * others.min() > others.max()) & (others.nunique() > 10)       # beyond a gap, from many,
        far &= (off == 0).sum() >= 5                        # and often
        for value, count in edge[far].round(4).map("{:.7g}".format).value_counts().items():
            hints.append(f"{value} comes often, far from all else, in {count} column(s): missing? "
                         f"--na_values {value}")
    for name, ratio in table.unlike.items():
        if ratio > 30:
            hints.append(f"{name} varies {ratio:.0f} times more than in some group: give each a file?")
    for name, words, ids in zip(schema.categorical, schema.vocabulary, table.categorical.T):
        if (ids == UNK_ID).sum() > (ids > UNK_ID).sum():
            hints.append(f"{name}: most of its texts were not trained on: spelt otherwise?")
        elif len(words) > 20 and len(words) > len(table.observed) / 4:
            hints.append(f"{name}: {len(words)} texts, nearly each another: --drop_cols {name}?")
    for name, kind in table.kinds.items():
        if "distinct" in kind or "such as" in kind:
            hints.append(f"{name}: {kind}")
    if absent and not args.regular:
        hints.append(f"{absent:,} steps of time are absent: --regular adds rows, if steps are even")
    return hints[:3]                                        # the gravest first


def describe(table, args):
    """Print what was understood, in at most 30 lines."""
    schema = table.schema
    stamps = table.keys["time"]
    holes, runs = hole_runs(table)
    numbers = own_numbers(table).agg(["min", "mean", "max"])
    kinds = pd.Series(table.kinds)
    lines = kinds[schema.numeric + schema.categorical].to_frame("kind")
    lines["holes"] = [f"{share:.1%}" for share in 1 - table.observed.double().mean(dim=0)]
    lines["mean run"] = [f"{length:.1f}" for length in holes / runs.clamp(min=1)]
    values = [f"{low:.4g} to {high:.4g}, mean {mean:.4g}" for low, mean, high in numbers.T.to_numpy()]
    lines["values"] = values + [", ".join(words[:6]) for words in schema.vocabulary]
    print(f"{args.data}: {len(table.observed):,} rows, clock: {', '.join(schema.cycles) or 'none'}")
    print(lines.to_string(max_rows=14, max_colwidth=70))
    print("other columns:", kinds.drop(lines.index).to_dict() or "none")     # which are not learnt
    if table.time_columns:
        absent, repeated = absent_steps(table)
        print(f"time: {' '.join(table.time_columns)} ({table.pattern}), {stamps.min()} to {stamps.max()}, "
              f"step {time_step(stamps, stamps)}, {absent:,} absent, {repeated:,} repeated")
    for split in ("train", "val", "test"):
        segments = table.segments[split]
        print(f"{split}: {int(segments.diff(dim=1).sum()):,} rows, {len(segments)} sequence(s), "
              f"{len(table.starts(split, table.seq_len)):,} windows of {table.seq_len} rows side by side")
    print(f"--mask_span is {default_span(table):.3g} rows: as long as the holes, or 12 if these are too few")
    for hint in find_hints(table, args):
        print("hint:", hint)


if __name__ == "__main__":
    args = make_parser(__doc__, "data", "sensors").parse_args()
    describe(load_table(args), args)
    if args.data in SIMULATIONS:
        table, batch = tiny_batch()
        print("\nthe tiny table, and as a batch: numbers scaled, categories as ids, ? = missing")
        print(tiny_table().to_string(index=False), show(table.schema, batch), sep="\n")
