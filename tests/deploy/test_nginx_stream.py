"""The example of a load balancer passes TLS through unopened."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


def test_the_stream_example_is_valid(
    deploy: Path, tmp_path: Path, tool: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    text = (deploy / "nginx" / "stream.conf").read_text()
    built_in = "--with-stream " in tool("nginx", "-V").stderr + " "
    if not (built_in or MODULE.exists()):
        pytest.skip("nginx's stream module (libnginx-mod-stream) is not installed")
    include = "include /etc/nginx/modules-enabled/*.conf;"
    assert include in text
    load = "" if built_in else f"load_module {MODULE};"
    config = tmp_path / "stream.conf"
    config.write_text(text.replace(include, load).replace("pid /run/", f"pid {tmp_path}/"))
    done = tool("nginx", "-t", "-e", "stderr", "-c", config)
    assert done.returncode == 0, done.stderr


def test_tls_is_not_ended_before_the_coordinator(deploy: Path) -> None:
    text = (deploy / "nginx" / "stream.conf").read_text()
    settings = [line.split("#")[0].strip() for line in text.splitlines()]
    assert "listen 8443;" in settings
    assert not [
        line for line in settings if "ssl" in line or line.startswith(("http", "proxy_protocol"))
    ]
