"""Addresses of clusters. What runs on one is tested where it is used."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.extras import CLUSTER, list_missing
from dreammix_trt.ray_cluster import open_cluster

pytestmark = pytest.mark.skipif(bool(list_missing(CLUSTER)), reason="Ray is not installed (the extra `ray`)")


@pytest.mark.parametrize("address", ["nowhere", "ray://host:10001", "host:port", ":6379"])
def test_an_address_that_is_none_is_told(address: str) -> None:
    with pytest.raises(InputError, match="HOST:PORT"), open_cluster(address):
        pass


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=f"{address}: no Ray cluster answers"), open_cluster(address):
            pass


def test_a_server_of_another_kind_is_told() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(InputError, match="another server does"), open_cluster(f"127.0.0.1:{server.server_port}"):
            pass
