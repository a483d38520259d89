"""Chat templates are programs of strangers: none may stop the server, or take its memory, or read its files."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from support.server import RunningServer
from support.tiny_model import tiny_model

from fbiedge.chat_template import ChatTemplate
from fbiedge.serve.api_error import ApiError
from fbiedge.serve.templates import BoundedTemplate

HELLO: list = [{"role": "user", "content": "Hello"}]
HOSTILE = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(a='aaaaaaaa') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    "product": "{{ 'a' * 10000000000 }}",
    "power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "padding": "{{ '%1000000000d' % 1 }}{{ '{:>10000000000}'.format(1) }}",
    "long": "{{ 'a' * 50000000 }}",
    "range": "{{ range(10000000000) | list }}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch escaped') }}",
    "attr": "{{ messages | attr('__class__') }}{{ messages.__class__.__base__ }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "map": "{{ ['a'] | map(attribute='__class__') | map(attribute='__mro__') | list }}",
    "import": "{% import '/etc/passwd' as p %}{{ p }}",
    "include": "{% include '/etc/passwd' %}",
    "error": "{{ raise_exception('a line\\nand another') }}",
    "mutation": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_one_line_or_in_nothing_of_value(name: str, tmp_path: Path) -> None:
    template = BoundedTemplate(ChatTemplate(HOSTILE[name]), longest=100_000, seconds=3)
    started = time.monotonic()
    try:
        try:
            text = template.render(HELLO)
        except ApiError as error:
            assert error.status == 400 and "\n" not in error.message and "template" in error.message
        else:
            assert not re.search(r"root:|<class|<function|os\.", text) and len(text) <= 100_000
        assert time.monotonic() - started < 30
    finally:
        template.close()


def test_none_is_run_before_it_is_asked() -> None:
    """Compiling must not compute constants: that would happen in the server itself, where nothing bounds it."""
    code = "import sys; from fbiedge.chat_template import ChatTemplate; [ChatTemplate(one) for one in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", code, *HOSTILE.values()], timeout=20, check=True)


def test_no_file_of_the_current_folder_passes_for_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "jinja2", "fbiedge", "resource"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w')")
    monkeypatch.chdir(tmp_path)
    template = BoundedTemplate(ChatTemplate("{{ messages[0].content }}"), longest=1000)
    try:
        assert template.render(HELLO) == "Hello"
    finally:
        template.close()
    assert not Path("imported").exists()


def test_the_next_conversation_is_rendered_all_the_same() -> None:
    source = (
        "{% if messages[0].content == 'loop' %}" + HOSTILE["endless"] + "{% else %}{{ messages[0].content }}{% endif %}"
    )
    template = BoundedTemplate(ChatTemplate(source), longest=1000, seconds=1)
    try:
        for _ in range(2):
            with pytest.raises(ApiError, match="took longer than 1 s"):
                template.render([{"role": "user", "content": "loop"}])
            assert template.render([{"role": "user", "content": "ü \ud800 \u2028\n"}]) == "ü \ud800 \u2028\n"
    finally:
        template.close()


def test_a_server_of_a_hostile_model(tmp_path: Path) -> None:
    """It says at the start what is wrong, refuses conversations, and serves the rest."""
    model = tiny_model(tmp_path, chat_template=HOSTILE["power"])
    with RunningServer(model) as server:
        assert "chat template" in server.wait_for("warning: .*/v1/chat/completions will be refused")
        with httpx.Client(base_url=server.url, timeout=60) as http:
            answer = http.post("/v1/chat/completions", json={"messages": HELLO})
            assert answer.status_code == 400 and "chat template" in answer.json()["error"]["message"]
            assert http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1}).status_code == 200


def test_a_model_without_a_template(tmp_path: Path) -> None:
    with RunningServer(tiny_model(tmp_path)) as server:
        server.wait_for("warning: the model has no chat template")
        assert "/v1/completions" in server.wait_for("try: curl")
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "this model has no chat template; ask /v1/completions"
