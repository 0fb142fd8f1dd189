"""What operators read, through Prometheus' own parser."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.service.test_native import finish, post, wait_until
from tests.support.fake_service import LONG, FakePainter, Running


def read(client: httpx.Client) -> dict[tuple[str, ...], float]:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_numbers_follow_what_happens() -> None:
    painter = FakePainter()
    with Running(painter) as service, httpx.Client(base_url=service.url) as client:
        first = post(client, prompt="hold").json()
        assert painter.held.wait(LONG)
        second = post(client, prompt="break").json()
        now = read(client)
        assert now["dreammix_queue_running", "fake"] == now["dreammix_queue_waiting", "fake"] == 1
        assert now["process_resident_memory_bytes",] > 1e6
        painter.let_go.set()
        finish(client, first["id"]), finish(client, second["id"])
        client.delete(first["links"]["self"])
        post(client, num_inference_steps=10)
        wait_until(lambda: not service.app.state.house.jobs.list_open())
        now = read(client)
        assert now["dreammix_queue_running", "fake"] == now["dreammix_queue_waiting", "fake"] == 0
        assert now["dreammix_jobs_total", "fake", "done"] == 2 and now["dreammix_jobs_total", "fake", "failed"] == 1
        assert now["dreammix_errors_total", "engine_error"] == 1
        assert now["dreammix_wait_seconds_count", "fake"] == 3 and now["dreammix_run_seconds_count", "fake"] == 2
        assert now["dreammix_phase_seconds_count", "loop"] == 2
        assert abs(now["dreammix_phase_seconds_sum", "loop"] - 0.02) < 1e-9
        assert now["dreammix_step_seconds_count",] == 3 + 9  # the time of a first step holds what comes before it
        assert now["dreammix_results_kept",] == 2
        assert now["dreammix_results_bytes",] == 48 * 64 * 3


def test_health_and_readiness(client: httpx.Client) -> None:
    for path in ("/healthz", "/readyz"):
        assert client.get(path).json() == {"status": "ok"}
