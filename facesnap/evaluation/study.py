"""`study`: people judge the pictures of methods in pairs, side by side, in random order, without names.

    python -m facesnap.evaluation study PLAN FOLDER FOLDER… --answers answers.csv     the page, until Ctrl-C
    python -m facesnap.evaluation study --answers answers.csv --results FOLDER        what the answers say

Of each pair two questions: which is more like the person of the reference, and which is the better picture. Each judge
has an order of their own, from their name, and goes on where they stopped. The page is served by the standard library
and asks nothing of anybody else; the pictures' addresses say which pair and side, never which method.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from facesnap.errors import InputError, check_number
from facesnap.evaluation import html, ranking, report
from facesnap.evaluation import plan as plans
from facesnap.evaluation.plan import Plan
from facesnap.evaluation.score import check
from facesnap.images import open_image

QUESTIONS = {"likeness": "Which one is more like the person?", "quality": "Which one is the better picture?"}
ANSWERS = ("left", "same", "right")
COLUMNS = ("plan", "judge", "file", "question", "left", "right", "answer")
PAGE = Path(__file__).with_name("study.html")
MOST_NAME, MOST_BODY = 40, 10_000  # characters of a judge's name; bytes of an answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, nargs="?", help="a plan's folder")
    parser.add_argument("folders", type=Path, nargs="*", help="the methods' folders, two or more")
    parser.add_argument("--answers", required=True, type=Path, help="a .csv file, continued if it is there")
    parser.add_argument("--results", type=Path, help="instead of the page: write what the answers say into this folder")
    parser.add_argument("--pairs", type=int, default=60, help="of each judge")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the page to the network")
    parser.add_argument("--port", type=int, default=7870)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.results is not None:
        return results(arguments.answers, arguments.results)
    if arguments.plan is None:
        raise InputError("Give a plan's folder and the methods' folders, or --results FOLDER for what was answered.")
    study = Study(plans.read(arguments.plan), arguments.folders, arguments.answers, arguments.pairs)
    if study.left_out:
        print(f"{study.left_out} rows are not asked about: a method has no picture of them.", flush=True)
    try:
        server = serve(study, arguments.host, arguments.port)
    except OSError as error:
        where = f"{arguments.host}:{arguments.port}"
        raise InputError(f"No page can be served at {where} ({error}): give another --port.") from error
    print(f"The study is at http://{arguments.host}:{server.server_port}; Ctrl-C ends it.", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
    return {"answers": len(study.answered)}


# ------------------------------------------------------------------------------------------------ the study


@dataclass(frozen=True)
class Pair:
    """One row of the plan by two methods, as a judge sees it."""

    row: int
    left: str
    right: str


class Study:
    """Which pairs a judge is asked about, and what was answered so far, in a CSV file."""

    def __init__(self, plan: Plan, folders: Sequence[Path], answers: Path, pairs: int):
        names = [folder.name for folder in folders]
        if len(set(names)) < max(2, len(names)):
            raise InputError("A study compares two or more methods' folders of different names.")
        check_number("number of pairs", pairs, 1, 100_000, whole=True)
        gone = set().union(*(check(folder, plan, "refuse")[0] for folder in folders))
        self.rows = [k for k, row in enumerate(plan.rows) if row.file not in gone]
        self.left_out = len(gone)
        if not self.rows:
            raise InputError("There is no row that all methods have made a picture of.")
        self.plan, self.folders, self.answers, self.pairs = plan, dict(zip(names, folders, strict=True)), answers, pairs
        self.lock, self.answered = threading.Lock(), set()
        if answers.exists():
            for line in read_answers(answers):
                if line["plan"] != plan.digest or not {line["left"], line["right"]} <= set(names):
                    raise InputError(f"'{answers.name}' holds answers to another study: give another --answers.")
                self.answered.add(tuple(line[name] for name in COLUMNS[1:-1]))
        else:
            answers.parent.mkdir(parents=True, exist_ok=True)
            self._write(COLUMNS)

    def asked(self, judge: str) -> list[Pair]:
        """A judge's pairs, the same whenever asked: every two methods equally often, each row as late again as may
        be, sides by chance."""
        digest = hashlib.sha256(f"{self.plan.digest} {judge}".encode()).digest()
        rng = np.random.default_rng(list(digest[:16]))
        matches = list(itertools.combinations(self.folders, 2))
        rows: list[int] = []
        while len(rows) < self.pairs:
            rows += rng.permutation(self.rows).tolist()
        order = itertools.chain.from_iterable(rng.permutation(len(matches)).tolist() for _ in itertools.count())
        found: dict[tuple, Pair] = {}
        for row, k in itertools.islice(zip(rows, order, strict=False), self.pairs):
            left, right = matches[k] if rng.random() < 0.5 else matches[k][::-1]
            found.setdefault((row, *matches[k]), Pair(row, left, right))  # the same pair is never asked twice
        return list(found.values())

    def next(self, judge: str) -> dict[str, Any]:
        """What the page shows next, without a name."""
        asked = self.asked(judge)
        for number, pair in enumerate(asked):
            for question, words in QUESTIONS.items():
                if self._key(judge, pair, question) not in self.answered:
                    row = self.plan.rows[pair.row]
                    where = {"number": number, "of": len(asked), "question": question}
                    return {**where, "words": words, "prompt": row.prompt}
        return {"done": True, "of": len(asked)}

    def put(self, judge: str, number: int, question: str, answer: str) -> None:
        """Writes an answer down; one that was given before stays as it was."""
        asked = self.asked(judge)
        if question not in QUESTIONS or answer not in ANSWERS or not 0 <= number < len(asked):
            raise InputError("There is no such question or answer.")
        key = self._key(judge, asked[number], question)
        with self.lock:
            if key not in self.answered:
                self._write((self.plan.digest, *key, answer))
                self.answered.add(key)

    def picture(self, judge: str, number: int, side: str) -> bytes:
        """The left or right picture of a pair, or the reference, as PNG of its pixels alone."""
        asked = self.asked(judge)
        if side not in ("left", "right", "reference") or not 0 <= number < len(asked):
            raise InputError("There is no such picture.")
        row = self.plan.rows[asked[number].row]
        path = self.plan.folder / row.reference
        if side != "reference":
            path = self.folders[getattr(asked[number], side)] / row.file
        stream = io.BytesIO()
        Image.fromarray(open_image(path)).save(stream, "PNG")
        return stream.getvalue()

    def _key(self, judge: str, pair: Pair, question: str) -> tuple[str, ...]:
        return judge, self.plan.rows[pair.row].file, question, pair.left, pair.right

    def _write(self, line: Sequence[str]) -> None:
        with self.answers.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(line)


def read_answers(path: Path) -> Iterator[dict[str, str]]:
    """The lines of an answers file; InputError where it is none."""
    if not path.is_file():
        raise InputError(f"There is no file '{path.name}' of answers.")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise InputError(f"'{path.name}' is no file of answers: its columns must be {', '.join(COLUMNS)}.")
        for number, line in enumerate(reader, 2):
            if line["question"] not in QUESTIONS or line["answer"] not in ANSWERS:
                raise InputError(f"Line {number} of '{path.name}' is no answer: correct or remove it.")
            yield line


# ------------------------------------------------------------------------------------------------- the page


def serve(study: Study, host: str, port: int) -> ThreadingHTTPServer:
    """A server for the study, not yet running; port 0 takes any that is free."""
    return ThreadingHTTPServer((host, port), partial(Page, study))


class Page(BaseHTTPRequestHandler):
    """Answers one request of a judge's browser."""

    def __init__(self, study: Study, *connection: Any):
        self.study = study
        super().__init__(*connection)

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        given = {name: values[0] for name, values in parse_qs(address.query).items()}
        if address.path == "/":
            self.answer(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif address.path == "/next":
            self.attempt(lambda: self.study.next(judge_of(given)))
        elif address.path == "/picture":
            number = int(n) if (n := given.get("number", "")).isdecimal() else -1
            self.attempt(lambda: self.study.picture(judge_of(given), number, given.get("side", "")))
        else:
            self.answer(404, "text/plain", b"There is nothing here.")

    def do_POST(self) -> None:
        # only a page of this very server can send JSON without asking first, and we allow nobody else
        is_json = self.headers.get_content_type() == "application/json"
        length = int(n) if (n := self.headers.get("Content-Length", "")).isdecimal() else MOST_BODY + 1
        if self.path != "/answer" or not is_json or length > MOST_BODY:
            self.answer(400, "text/plain", b"This is no answer.")
            return
        self.attempt(lambda: self.take(json.loads(self.rfile.read(length))))

    def take(self, given: Any) -> dict[str, Any]:
        if not isinstance(given, dict) or not isinstance(given.get("number"), int):
            raise InputError("This is no answer.")
        judge = judge_of(given)
        self.study.put(judge, given["number"], str(given.get("question")), str(given.get("answer")))
        return self.study.next(judge)

    def attempt(self, work: Any) -> None:
        try:
            found = work()
        except (InputError, json.JSONDecodeError) as error:
            said = str(error) if isinstance(error, InputError) else "This is no JSON."
            self.answer(400, "application/json", json.dumps({"error": said}).encode())
            return
        if isinstance(found, bytes):
            self.answer(200, "image/png", found)
        else:
            self.answer(200, "application/json", json.dumps(found).encode())

    def answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing: the judges' names are in the addresses."""


def judge_of(given: dict[str, Any]) -> str:
    name = str(given.get("judge", "")).strip()
    if not name or len(name) > MOST_NAME or not name.isprintable():
        raise InputError(f"Give a name of 1 to {MOST_NAME} characters; any will do.")
    return name


# ---------------------------------------------------------------------------------------------- the results


def results(answers: Path, out: Path) -> dict[str, Any]:
    """Strengths of the methods by each question, with intervals over judges; writes study.json and study.html."""
    lines = list(read_answers(answers))
    if not lines:
        raise InputError(f"'{answers.name}' holds no answer yet.")
    if len({line["plan"] for line in lines}) > 1:
        raise InputError(f"'{answers.name}' holds answers to several studies: keep those of one plan.")
    names = sorted({line[side] for line in lines for side in ("left", "right")})
    found: dict[str, Any] = {"judges": len({line["judge"] for line in lines}), "answers": len(lines), "questions": {}}
    parts = ["<h1>What the judges said</h1>", f"<p>{found['judges']} judges, {len(lines)} answers.</p>"]
    for question, words in QUESTIONS.items():
        some = [line for line in lines if line["question"] == question]
        if not some:
            continue
        each = [wins(group, names) for _, group in itertools.groupby(sorted(some, key=_judge), _judge)]
        values, ends = ranking.ranked(each)
        same = float(np.mean([line["answer"] == "same" for line in some]))
        order = np.argsort(-values)
        told = {names[k]: {"strength": float(values[k]), "95": ends[k].tolist()} for k in order}
        found["questions"][question] = {"methods": told, "no_difference": same, "answers": len(some)}
        rows = [(names[k], float(values[k]), float(ends[k][0]), float(ends[k][1])) for k in order]
        parts.append(html.intervals(rows, f"{words} (Bradley-Terry, 95 % over judges)"))
        parts.append(f"<p>No difference: {same:.0%} of {len(some)} answers.</p>")
    out.mkdir(parents=True, exist_ok=True)
    report.write(out / "study.json", found)
    report.write_whole(out / "study.html", html.document("What the judges said", *parts))
    return found


def wins(lines: Any, names: Sequence[str]) -> np.ndarray:
    """Answers → (M, M): how often each row was preferred to each column; "no difference" is half a win for each."""
    found = np.zeros((len(names), len(names)))
    for line in lines:
        left, right = names.index(line["left"]), names.index(line["right"])
        share = {"left": 1.0, "same": 0.5, "right": 0.0}[line["answer"]]
        found[left, right] += share
        found[right, left] += 1 - share
    return found


def _judge(line: dict[str, str]) -> str:
    return line["judge"]


def lines(found: dict[str, Any]) -> list[tuple[str, object, str]]:
    """For the terminal: name, value, remark."""
    rows: list[tuple[str, object, str]] = [("answers", found["answers"], "")]
    for question, told in found.get("questions", {}).items():
        for name, value in told["methods"].items():
            rows.append((f"{question}: {name}", value["strength"], "95 % {:.2f} to {:.2f}".format(*value["95"])))
    return rows
