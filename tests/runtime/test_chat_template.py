"""Chat templates: Hugging Face's helpers, and nothing that leads out of the sandbox."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fbiedge.chat_template import ChatTemplate, Message
from fbiedge.errors import ModelFileError

MESSAGES: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>there</b> & 'you'"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "漢字?"},
]

# Written like the templates of released models: loop variables, namespaces, slices, whitespace control, filters.
LLAMA_STYLE = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system_message if loop.first and system_message is defined else '') + message.content + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' + message.content + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""


def test_a_template_of_a_released_model_renders() -> None:
    template = ChatTemplate(LLAMA_STYLE, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(MESSAGES) == (
        "<s>[INST] Be brief.\n\nHi <b>there</b> & 'you' [/INST] Hello.</s>[INST] 漢字? [/INST]"
    )


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    "source",
    [
        LLAMA_STYLE,
        "{% for m in messages %}\n  {% if m.role == 'system' %}\n    {% continue %}\n  {% endif %}\n{{ m.content }}\n{% endfor %}",
        "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}",
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "{{ tools is none }} {{ documents }} {{ unknown is defined }} {{ messages | length }} {{ unknown }}",
    ],
)
def test_renders_as_transformers_does(source: str, add_generation_prompt: bool) -> None:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from fbiedge.initialize import byte_tokenizer

    peer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_tokenizer()), bos_token="<s>", eos_token="</s>", chat_template=source
    )
    expected = peer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt)
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(MESSAGES, add_generation_prompt=add_generation_prompt) == expected


def test_strftime_now() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render(MESSAGES))


def test_raise_exception_becomes_one_line() -> None:
    with pytest.raises(ModelFileError, match="^the model's chat template failed: roles must alternate$"):
        ChatTemplate("{{ raise_exception('roles must alternate\nin pairs') }}").render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('touch %s').read() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch %s') }}",
        "{{ ''['__cl' ~ 'ass__']['__base__'] }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ (messages | map(attribute='__class__') | first).__mro__ }}",
        "{{ messages.append('x') }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ open('/etc/passwd').read() }}",
        "{{ range(1000000000) | list }}",
    ],
)
def test_escapes_are_refused(source: str, tmp_path: Path) -> None:
    target = tmp_path / "escaped"
    with pytest.raises(ModelFileError, match="chat template"):
        ChatTemplate(source.replace("%s", str(target))).render(MESSAGES)
    assert not target.exists()


@pytest.mark.parametrize("source", ["{% for %}", "{{ messages", "{% endif %}"])
def test_syntax_errors_name_the_line(source: str) -> None:
    with pytest.raises(ModelFileError, match="line 1"):
        ChatTemplate(source)


def test_the_template_can_not_change_the_conversation() -> None:
    messages: list[Message] = [{"role": "user", "content": "a"}]
    ChatTemplate("{% set messages = [] %}{{ messages }}").render(messages)
    assert messages == [{"role": "user", "content": "a"}]
