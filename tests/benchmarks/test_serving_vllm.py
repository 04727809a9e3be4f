"""The benchmarks that start `vllm serve`: their arguments, what they make of answers, and a soak of a tiny model."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from benchmarks import served_score, serving_vllm, soak_vllm
from benchmarks.serving_vllm import Timing, parse_workload, table
from benchmarks.soak_vllm import Job, first_difference, make_jobs, margin
from dtr_deploy.engines.base import Workload
from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.model import save_hybrid
from tiny import tiny_hybrid, tiny_tokenizer

pytestmark = pytest.mark.vllm


def test_workloads_are_read() -> None:
    assert parse_workload("4096+128x8") == Workload(4096, 128, 8)
    assert parse_workload("512+64") == Workload(512, 64, 1)


@pytest.mark.parametrize("text", ["4096", "0+64", "512+1x2", "512+64x0", "a+b"])
def test_other_workloads_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"PROMPT\+OUTPUTxCONCURRENCY"):
        parse_workload(text)


def test_ratios_are_taken_within_a_round() -> None:
    """The machine is twice as slow in the second round: the ratio does not see it."""
    timings = {
        "base": [Timing(2.0, 0.02, 100), Timing(4.0, 0.04, 50)],
        "hybrid": [Timing(1.0, 0.01, 150), Timing(2.0, 0.02, 75)],
    }
    drawn = table([Workload(4096, 64)], [timings])
    cells = [next(iter(column.cells)) for column in drawn.columns]
    assert cells == [
        "4,096 + 64 tokens",
        "3.00 / 1.50",
        "2.00 (2.00-2.00)",
        "30.0 / 15.0",
        "2.00 (2.00-2.00)",
        "75 / 112",
        "1.50 (1.50-1.50)",
    ]


@pytest.mark.parametrize("app", [serving_vllm.app, soak_vllm.app])
def test_a_folder_that_is_no_checkpoint_is_one_line(app, tmp_path: Path) -> None:
    folders = ["--base", tmp_path, "--hybrid", tmp_path] if app is serving_vllm.app else ["--model", tmp_path]
    result = CliRunner().invoke(app, [str(x) for x in folders])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and str(tmp_path) in result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "corpus.txt").write_text("a state of fixed size, however long the text is; " * 40)
    return tmp_path


def test_jobs_of_a_soak(folder: Path) -> None:
    jobs = make_jobs(folder, folder / "corpus.txt", 200, 300, 16, 0.1, seed=3)
    lengths = [len(job.prompt) for job in jobs]
    assert len(jobs) == 200 and min(lengths) == 1 and max(lengths) == 300
    hung_up = [job.hang_up for job in jobs if job.hang_up]
    assert len(hung_up) == 20 and all(0 < tokens < 16 for tokens in hung_up)
    long = [tuple(job.prompt[:30]) for job in jobs if len(job.prompt) >= 30]
    assert max(long.count(beginning) for beginning in set(long)) >= 5, "no prefix is shared"
    assert [job.prompt for job in make_jobs(folder, folder / "corpus.txt", 200, 300, 16, 0.1, seed=3)] == [
        job.prompt for job in jobs
    ]


def test_a_corpus_that_is_too_short_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="fewer than --longest 7,000"):
        make_jobs(folder, folder / "corpus.txt", 10, 7000, 16, 0.1, seed=0)


def test_differences_and_margins() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 2]) is None  # hung up on: what had come is right
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1], [1, 2]) == 1
    assert margin({"token_id:4": -1.0, "token_id:9": -1.25}) == 0.25


@pytest.fixture
def oracle() -> Iterator[SimpleNamespace]:
    """A server that answers 7, 8, 9 to everything, the second token with a rival 1e-5 behind."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            tops = [{"token_id:7": -0.1, "token_id:1": -3.0}, {"token_id:8": -0.7, "token_id:2": -0.70001}]
            tops.append({"token_id:9": -0.1, "token_id:1": -3.0})
            logprobs = {"tokens": ["a", "b", "c"], "token_logprobs": [-0.1, -0.7, -0.1], "top_logprobs": tops}
            choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": logprobs, "token_ids": [7, 8, 9]}
            body = {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", folder=Path("m"))
    server.shutdown()
    thread.join()
    server.server_close()


def test_answers_that_differ_are_faults_and_ties_are_counted(oracle, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [Job([1], tokens=tokens) for tokens in ([7, 8, 9], [7, 8], [7, 2, 5], [7, 8, 1])]
    (fault,) = asyncio.run(soak_vllm._compare(oracle, jobs, 3))
    assert "token 2 differs from the isolated run" in fault
    assert "2 of 4 answers equal their isolated runs token by token, 1 part at a tie" in capsys.readouterr().out


@pytest.mark.slow
def test_soak_of_a_tiny_model(folder: Path) -> None:
    model = tiny_hybrid("llama", (None, "gated_deltanet", "gla"), 64, 3, hidden=192)
    save_hybrid(model, tiny_tokenizer(), folder)
    options = ["--requests", 40, "--concurrency", 8, "--longest", 700, "--output", 8, "--kv-cache-gib", 0.25]
    result = CliRunner().invoke(
        soak_vllm.app, [str(x) for x in ("--model", folder, "--corpus", folder / "corpus.txt", *options)]
    )
    assert result.exit_code == 0, result.output
    assert "40 of 40 answers equal their isolated runs token by token" in result.output
    assert "vllm:num_requests_running 0" in result.output and "no faults" in result.output


@pytest.mark.slow
def test_lm_eval_finds_the_toolkits_score_on_a_server(folder: Path) -> None:
    """In float32 every document has the same score; a random model is right about as often as a coin."""
    save_hybrid(tiny_hybrid("llama", (None, "gated_deltanet", "gla"), 64, 3, hidden=192), tiny_tokenizer(), folder)
    options = [
        "--task",
        "recipes/data/reviews/lm_eval.yaml",
        "--items",
        24,
        "--dtype",
        "float32",
        "--kv-cache-gib",
        0.1,
    ]
    result = CliRunner().invoke(served_score.app, [str(x) for x in ("--model", folder, *options)])
    assert result.exit_code == 0, result.output
    assert "24 of 24 documents have the same score" in result.output
