"""Chat templates: the text transformers gives for well-meant ones, an error in little time and memory for hostile ones."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

import pytest
from stretto import ModelFileError
from stretto.models.loading.template import ChatTemplate

from tests.subproc import python

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi <b>there</b> & 'you' \n"},
    {"role": "assistant", "content": "Yes.\n\nÜber 日本 \U0001f600"},
    {"role": "user", "content": "ok?"},
]
MESSAGES = {
    "chat": CHAT,
    "one": CHAT[1:2],
    "empty": [{"role": "user", "content": ""}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": " two "}]}],
    "call": [*CHAT[:2], {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, 2.5, None, "é"]}}}]},
             {"role": "tool", "content": '{"y": 1}'}],
    "thinking": [*CHAT[:2], {"role": "assistant", "content": "<think>\nwell\n</think>\n\nSo."}, {"role": "user", "content": "And?"}],
}  # fmt: skip
# In the manner of the model families, not their text.
TEMPLATES = {
    "chatml": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}
{{'<|im_start|>' + message['role'] + '\n' + (message['content'] or '') | string + '<|im_end|>' + '\n'}}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first = messages[0]['content'] + '\n\n' -%}
    {%- else -%}{%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}
    {%- set rest = messages[1:] -%}
{%- else -%}{%- set first = "" -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception("roles must alternate") }}{%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("no content") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
""",
    "llama": """{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0].role == 'system' %}{%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string + "\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}{{- message.tool_calls[0].function.arguments | tojson }}{{- message.tool_calls | tojson(indent=4) }}
    {%- elif message.content is string %}{{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\n\n' ~ message['content'] | trim ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant\n\n' }}{%- endif %}
""",
    "qwen": """{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not message.content.startswith('<tool') %}
        {%- set ns.searching = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}
        {%- generation %}{{- '<|im_start|>assistant\n' + (reasoning if loop.index0 > ns.last else '') + content }}{%- endgeneration %}
    {%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}
    {%- if loop.previtem and loop.previtem.role == message.role %}{%- continue %}{%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}""",
    "odds and ends": """{% macro show(m, deep=false) %}[{{ m.role|upper }}:{{ m.content|default('none', true)|string|replace('\n', '/')|title }}]{% endmacro %}
    {% for role, group in messages|groupby('role') %}{{ role }}={{ group|length }};{% endfor %}
  {{ messages|map(attribute='role')|unique|join(',') }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }}
{{ messages|rejectattr('role', 'in', ['user'])|map(attribute='role')|list|tojson }}
{{ {'b': 1, 'a': [true, none]}|dictsort }} {{ [3,1,2]|sort|first }} {{ 2.675|round(1) }} {{ 7 // 2 }} {{ -7 // 2 }} {{ 7.5|int }} {{ 'x'|indent(2, true) }}
{% set parts = [] %}{% for m in messages %}{{ show(m) }}{{ loop.cycle('-', '+') }}{% break %}{% endfor %}{{ '%' }}{{ 'a,b'.split(',') }}{{ [1,2]|sum }}""",
}


@pytest.mark.parametrize("prompted", [True, False], ids=["prompted", "bare"])
@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_text_is_that_of_transformers(template, messages, prompted):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    variables = {"bos_token": "<bos>", "eos_token": "<eos>"}

    def theirs() -> str:
        rendered, _ = utils.render_jinja_template(
            [MESSAGES[messages]], chat_template=TEMPLATES[template], add_generation_prompt=prompted, tools=None, documents=None, **variables
        )
        text: str = rendered[0]
        return text

    ours = ChatTemplate(TEMPLATES[template], "model", variables)
    try:
        want = theirs()
    except Exception as error:
        refusal = re.escape(str(error))
        with pytest.raises(ValueError, match=refusal):
            ours.render(MESSAGES[messages], add_generation_prompt=prompted)
    else:
        assert ours.render(MESSAGES[messages], add_generation_prompt=prompted) == want


def test_date_and_refusal():
    assert ChatTemplate("{{ strftime_now('%Y') }}", "model", {}).render(CHAT) == str(datetime.now().year)
    with pytest.raises(ValueError, match=r"apply_chat_template: messages: roles") as caught:
        ChatTemplate("{{ raise_exception('roles') }}", "model", {}).render(CHAT)
    assert not isinstance(caught.value, ModelFileError)  # the messages are at fault, not the file


def test_messages_are_not_changed():
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    before = json.dumps(messages)
    with pytest.raises(ModelFileError):
        ChatTemplate("{{ messages[0].content.append(1) }}", "model", {}).render(messages)
    assert json.dumps(messages) == before


@pytest.mark.parametrize("messages", [None, "text", [], [1], [{}], [{"role": 1}], [{"role": "user", "content": object()}],
                                      [{"role": "user", "content": float("nan")}]], ids=str)  # fmt: skip
def test_malformed_messages(messages):
    with pytest.raises(ValueError, match="apply_chat_template: messages"):
        ChatTemplate("x", "model", {}).render(messages)


BIG = "{% set b = ('f' * 1000000) | int(0, 16) %}"
HOSTILE = {
    # time
    "a loop in a loop in a loop": "{% for i in range(100000) %}{% for j in range(100000) %}{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a recursive loop": "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a growing list": "{% set n = namespace(l=[]) %}{% for i in range(100000) %}{% set n.l = n.l + [i] %}{% endfor %}",
    "sorting all day": "{% for i in range(99999) %}{% set x = range(99999) | map('string') | sort %}{% endfor %}",
    "a power": "{{ 9 ** 999999999 }}",
    "a power by multiplication": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "dividing integers of a million digits": BIG + "{{ b // (b - 1) }}",
    "a remainder of such": BIG + "{{ b % 3 }}",
    "rounding to a billion digits": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "a range without end": "{% for i in range(10 ** 12) %}{% endfor %}",
    # memory
    "doubling text": "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "text times a billion": "{{ 'x' * 1000000000 }}",
    "a list times a billion": "{{ [1] * 1000000000 }}",
    "lists of lists of lists": "{% set n = namespace(l=['x']) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "the text of a namespace": "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
    "a width": "{{ '%999999999d' % 1 }}",
    "str.format": "{{ '{:999999999}'.format(1) }}",
    "padding": "{{ 'x'.ljust(1000000000) }}",
    "centring": "{{ 'x' | center(1000000000) }}",
    "replacing nothing by much": "{{ ('a' * 999999).replace('', 'b' * 999999) }}",
    "joining with much": "{{ ('x' * 999999).join(range(99999) | map('string')) }}",
    "joining a list with much": "{{ range(99999) | join('x' * 999999) }}",
    "indenting much": "{{ ('\n' * 99999) | indent(64) }}",
    "JSON in deep steps": "{% set n = namespace(x=range(9999)|list) %}{% for i in range(200) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x|tojson(indent=16) }}",
    "a date of a billion characters": "{{ strftime_now('%999999999Y') }}",
    "many large values": "{% set b = '\U0001f600' * 999999 %}" + "".join(f"{{% set a{i} = b ~ 'x' %}}" for i in range(3000)),
    "many large slices": "{% set b = 'x' * 999999 %}" + "".join(f"{{% set a{i} = b.upper() %}}" for i in range(3000)),
    "writing much in small pieces": "{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}",
    # reach
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes by filter": "{{ ('' | attr('__class__')).__mro__ }}",
    "globals of a function": "{{ raise_exception.__globals__.items() }}",
    "a frame": "{{ (range(3) | map('string')).gi_frame.f_builtins }}",
    "including a file": "{% include '/etc/passwd' %}",
    "importing a file": "{% import '/etc/passwd' as p %}",
    "extending a file": "{% extends '/etc/passwd' %}",
    "changing the messages": "{{ messages.append(1) }}",
    "clearing a message": "{{ messages[0].clear() }}",
    # what is no template
    "a name that does not exist, called": "{{ nothing() }}",
    "an infinite constant": "{{ " + "9" * 400 + ".0 }}",
    "a filter that does not exist": "{{ 'x' | shell }}",
    "an unfinished block": "{% for x in messages %}",
    "ten thousand parentheses": "{{ " + "(" * 10000 + "1" + ")" * 10000 + " }}",
    "ten thousand sums": "{{ " + "+".join(["1"] * 10000) + " }}",
    "ten thousand attributes": "{{ a" + ".b" * 10000 + " }}",
    "three thousand loops": "{% for i in [1] %}" * 3000 + "{% endfor %}" * 3000,
    "a source of 200,000 characters": "x" * 200_000,
    "division by zero": "{{ 1 // 0 }}",
    "sum of texts": "{{ ['a', 'b'] | sum }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template(name):
    with pytest.raises(ModelFileError, match=r"^model\.gguf: chat template: ") as caught:
        ChatTemplate(HOSTILE[name], "model.gguf: chat template", {}).render(CHAT)
    assert len(str(caught.value)) < 400


def test_hostile_templates_take_little_time_and_memory(tmp_path):
    (tmp_path / "sources").write_text(json.dumps(HOSTILE))
    python(f"""
        import json, resource, time
        from stretto.models.loading.template import ChatTemplate
        ChatTemplate("x", "warm", {{}}).render([{{"role": "user"}}])
        now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (400 << 20),) * 2)
        for name, source in json.load(open({str(tmp_path / "sources")!r})).items():
            start = time.process_time()
            try:
                ChatTemplate(source, "w", {{}}).render([{{"role": "user", "content": "x"}}])
                end = "nothing"
            except BaseException as error:
                end = type(error).__name__ + str(error)
            took = time.process_time() - start
            assert end.startswith("ModelFileError") and "MemoryError" not in end, (name, end)
            assert took < 1.5, (name, took)
    """)


def test_a_long_conversation_is_no_attack():
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 400} for i in range(1000)]
    text = ChatTemplate(TEMPLATES["gemma"], "model", {"bos_token": "<bos>"}).render(messages)
    assert len(text) > 2_000_000
