"""Chat templates: what transformers renders is what we render, and what a template may not do it cannot."""

import json
import os

import pytest

from effscale.data import train_tokenizer
from effscale.data.tokenizer import save_tokenizer
from effscale.experiments.shared import assets
from effscale.interop import FolderError, load_tokenizer
from effscale.interop.chat import read_chat
from effscale.interop.companions import Companions
from effscale.rlhf.data import ChatTemplate, Message, RecordError, TemplateError
from effscale.rlhf.data.chat.plain import PLAIN_FORMATS

pytest.importorskip("jinja2", reason="the extra chat is not installed")
from effscale.rlhf.data.chat import sandbox

CHAT_ML = """{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
# Of what templates on the Hub use: namespaces, macros, filters, loop variables, break, the tag generation, tests, slices.
MANY = """{{ bos_token }}{% set ns = namespace(system='', n=0) %}
{%- macro turn(role, text) -%}
[{{ role | upper }}]{{ text | trim | replace('\\n\\n', ' / ') }}{{ eos_token if role == 'assistant' else '' }}
{% endmacro -%}
{%- for m in messages if m.role == 'system' %}{% set ns.system = ns.system ~ m.content %}{% endfor %}
{{- ns.system }}
{%- for m in (messages | rejectattr('role', 'equalto', 'system') | list) %}
{%- if loop.index0 == 9 %}{% break %}{% endif %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set ns.n = ns.n + 1 %}
{% generation %}{{ turn(m.role, m.content) }}{% endgeneration %}
{%- endfor -%}
{{ ns.n }} {{ {'last': messages[-1].content, 'é': "<&'"} | tojson(indent=1) }} {{ '%s-%05.1f' | format('x', 2) }} {{ '{:>4}'.format(7) }}
{%- if tools is defined and tools %}tools{% endif %}{{ messages[1:] | length }}{{ undefined_thing }}{{ none }}
{%- if add_generation_prompt %}{% for x in range(2) %}{{ loop.cycle('[', ']') }}{{ x }}{% endfor %}{% endif %}"""
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
    "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS = [
    [("user", "Hi")],
    [("system", "Rules."), ("user", " Hi \n\n there "), ("assistant", "Yes.")],
    [("user", "a"), ("assistant", "b <b>"), ("user", "c")],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = train_tokenizer(["ab ab"], vocab_size=262, special_tokens=special)
    save_tokenizer(tokenizer, place)
    config(place, chat_template=CHAT_ML)
    return place


def config(place, **fields):
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | fields  # fmt: skip
    (place / "tokenizer_config.json").write_text(json.dumps(fields))


def render(source, messages=(("user", "Hi"),), **values):
    return ChatTemplate(source=source, values=values).render([Message(*m) for m in messages])


@pytest.mark.parametrize(
    ("source", "place"),
    [(CHAT_ML, "field"), (SMOLLM2, "list"), (MANY, "file")],
    ids=["ChatML", "SmolLM2", "much"],
)
def test_templates_of_a_folder_equal_transformers(source, place, folder, tmp_path):
    hf = pytest.importorskip("transformers", reason="the oracle is transformers")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    named = [{"name": "default", "template": source}, {"name": "tools", "template": "no"}]
    config(tmp_path, **{"field": {"chat_template": source}, "list": {"chat_template": named}, "file": {}}[place])  # fmt: skip
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(source)
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)
    ours = read_chat(tmp_path).chat_template()
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        for asks in (False, True):
            expected = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asks
            )
            found = ours.render([Message(*m) for m in chat], add_generation_prompt=asks)
            assert found == expected


@pytest.mark.slow  # its vocabulary is read with types checked at each step
def test_smollm2_s_own_template(tmp_path):
    utils = pytest.importorskip(
        "transformers.utils.chat_template_utils", reason="the oracle is transformers"
    )
    pytest.importorskip("gguf", reason="gguf is not installed")
    try:
        found = read_chat(assets.smollm2_file())
    except assets.MissingAssetError as error:
        pytest.skip(str(error))
    ours = found.chat_template()
    assert ours.source == SMOLLM2
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        for asks in (False, True):
            expected, _ = utils.render_jinja_template(
                [messages], chat_template=ours.source, add_generation_prompt=asks
            )
            assert [
                ours.render([Message(*m) for m in chat], add_generation_prompt=asks)
            ] == expected
    assert found.tokenizer.id_to_token(found.eos_token_id) == "<|im_end|>"
    assert found.pad_token_id == found.eos_token_id
    # A model that is saved like the file has the template, too.
    fields = {"model_type": "llama", "vocab_size": 49152}
    Companions(fields, assets.smollm2_file(), None).write(tmp_path)
    saved = read_chat(tmp_path)
    assert saved.chat_template().source == SMOLLM2
    assert saved.eos_token_id == found.eos_token_id


def test_a_prompt_and_its_answer_make_the_whole():
    template = ChatTemplate(source=CHAT_ML)
    messages = [Message("user", "Hi")]
    whole = template.render([*messages, Message("assistant", "Yo")])
    assert template.prompt(messages) + template.answer(messages, "Yo") == whole
    other = ChatTemplate(source="{{ messages | length }}{{ messages[-1].content }}")
    with pytest.raises(RecordError, match="writes '2Yo' where the prompt has '1Hi'"):
        other.answer(messages, "Yo")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "attribute '__class__' of a str"),
        ("{{ messages.__class__ }}", "attribute '__class__' of a list"),
        ("{{ ''['__class__'] }}", "attribute '__class__' of a str"),
        ("{{ '' | attr('__class__') }}", "attribute '__class__' of a str"),
        ("{{ [''] | map(attribute='__class__') | list }}", "attribute '__class__' of a str"),
        ("{{ cycler.__init__.__globals__ }}", "attribute '__init__'"),
        ("{{ '{0.__class__}'.format('') }}", "attribute '__class__' of a str"),
        ("{{ namespace(a=1).__class__ }}", "attribute '__class__'"),
        ("{{ messages.append(1) }}", "attribute 'append' of a list"),
        ("{{ messages[0].update(a=1) }}", "attribute 'update' of a dict"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{% for x in %}", "is invalid: line 1"),
        ("{{ raise_exception('no system turns') }}", "rejects these messages: no system turns"),
        ("{{ messages[0].content / 0 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ nothing.at.all }}", "UndefinedError: 'nothing' is undefined"),
    ],
)
def test_what_a_template_may_not_do(source, message):
    with pytest.raises(TemplateError, match=message):
        render(source)
    assert os.path.exists("/etc")  # we are still here


DOUBLE = "{% set ns = namespace(x=%s) %}{% for i in range(99) %}{% set ns.x = %s %}{% endfor %}"
TOO_MUCH = "it exceeds .* loop iterations, calls and elements"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "a width or count of 1,000,000,000"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", TOO_MUCH),
        ("{% for i in range(9999) %}{% for j in range(9999) if j < 0 %}{% endfor %}{% endfor %}", TOO_MUCH),
        ("{% macro f(n) %}{{ f(n - 1) if n else '' }}{{ f(n - 1) if n else '' }}{% endmacro %}{{ f(40) }}", TOO_MUCH),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'x' * 10**9 }}", TOO_MUCH),
        ("{{ [0] * 10**9 }}", TOO_MUCH),
        ("{{ 10**1000000000 }}", "an integer of more than"),
        ("{{ 'x'.ljust(10**9) }}", "a width or count of 1,000,000,000"),
        ("{{ 'x' | center(10**9) }}", "a width or count of 1,000,000,000"),
        ("{{ [1] | tojson(indent=10**9) }}", "a width or count of 1,000,000,000"),
        ("{{ '%999999999d' % 1 }}", "a width in the format"),
        ("{{ '%*d' % (999999999, 1) }}", "a width in the format"),
        ("{{ '%999999999d' | format(1) }}", "a width in the format"),
        ("{{ '{:999999999}'.format(1) }}", "a width in the format"),
        ("{{ '{:{}}'.format(1, 999999999) }}", "a width or count of 999,999,999"),
        ("{% set s = 'a' * 9999 %}{% set s = s.replace('a', s) %}{{ s.replace('a', s) }}", TOO_MUCH),
        ("{% set s = 'a' * 1000000 %}{{ range(9999) | map('string') | join(s) }}", TOO_MUCH),
        ("{{ lipsum(9999) }}", "'lipsum' is undefined"),
        (DOUBLE.replace("%s", "'ab'", 1).replace("%s", "ns.x ~ ns.x"), TOO_MUCH),
        (DOUBLE.replace("%s", "'ab'", 1).replace("%s", "ns.x + ns.x"), TOO_MUCH),
        (DOUBLE.replace("%s", "'ab'", 1).replace("%s", "[ns.x, ns.x]") + "{{ ns.x }}", TOO_MUCH),
        (DOUBLE.replace("%s", "3", 1).replace("%s", "ns.x * ns.x"), "an integer of"),
        ("{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}", TOO_MUCH),
        ("{% for i in range(9999) %}" + "lorem ipsum " * 9999 + "{% endfor %}", TOO_MUCH),
        (DOUBLE.replace("%s", "'ab'.encode()", 1).replace("%s", "ns.x + ns.x"), TOO_MUCH),
        ("{{ '%999999999d'.encode() % 1 }}", "a width in the format"),
        ("x" * (1 << 21), "got 2,097,152"),
        (" ", "is empty"),
    ],
)  # fmt: skip
def test_how_much_a_template_may_do(source, message, monkeypatch):
    # A hundredth of the limit, for the time: types are checked at each step here.
    monkeypatch.setattr(sandbox, "WORK", sandbox.WORK // 100)
    with pytest.raises(TemplateError, match=message):
        render(source)


def test_long_chats_are_not_too_much():
    chat = [("user" if i % 2 == 0 else "assistant", "word " * 400) for i in range(2000)]
    assert render(CHAT_ML, chat).count("<|im_end|>") == 2001


def test_values_that_a_template_knows(folder):
    source = "{{ 'think' if enable_thinking else 'no' }}"
    assert render(source, enable_thinking=True) == "think"
    assert render(source) == "no"


def test_folders_without_a_usable_template(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert read_chat(tmp_path).chat_template() is None
    config(tmp_path, chat_template=3)
    with pytest.raises(TemplateError, match="must be a string, got 3"):
        read_chat(tmp_path).chat_template()
    config(tmp_path, chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(
        ValueError, match="name must be one of the folder's chat templates, 'rag', got 'default'"
    ):
        read_chat(tmp_path).chat_template()
    assert read_chat(tmp_path).chat_template("rag").render([]) == "x"
    with pytest.raises(FolderError, match="there is no folder"):
        read_chat(tmp_path / "elsewhere").chat_template()


def test_special_tokens_from_each_file(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    id_of = load_tokenizer(tmp_path).token_to_id
    write = lambda name, **fields: (tmp_path / f"{name}.json").write_text(json.dumps(fields))
    found = read_chat(tmp_path)  # no file: the usual name of an end
    assert (found.eos_token_id, found.pad_token_id, dict(found.names)) == (id_of("</s>"), None, {})
    write("config", eos_token_id=id_of("<s>"), pad_token_id=-1)
    assert read_chat(tmp_path).eos_token_id == id_of("<s>")
    write("generation_config", eos_token_id=[id_of("<|im_end|>"), id_of("</s>")])
    assert read_chat(tmp_path).eos_token_id == id_of("<|im_end|>")
    write("special_tokens_map", pad_token={"content": "<|im_start|>"}, eos_token="</s>")
    found = read_chat(tmp_path)
    assert (found.eos_token_id, found.pad_token_id) == (id_of("</s>"), id_of("<|im_start|>"))
    config(tmp_path, eos_token="<|im_end|>")
    assert read_chat(tmp_path).eos_token_id == id_of("<|im_end|>")


def test_plain_formats():
    chat = [Message(*m) for m in CHATS[2]]
    form = PLAIN_FORMATS["deepspeed_chat"]
    assert form.prompt(chat) == " Human: a Assistant: b <b> Human: c Assistant:"
    assert form.answer(chat, "d") == " d"
    with pytest.raises(
        ValueError,
        match="role must be one of user, assistant, system in a plain format, got 'tool'",
    ):
        form.prompt([Message("tool", "x")])
