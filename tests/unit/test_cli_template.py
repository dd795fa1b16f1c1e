"""Go templates: what Docker's documentation and people's scripts use, against what Go prints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyx_cli.template import Struct, Template, TemplateError, Texts

DATA = {
    "Name": "/web",
    "ID": "0123",
    "State": {"Running": True, "Pid": 42, "Health": None},
    "Args": ["a", "b c"],
    "Config": {"Labels": {"b": "2", "a": "1"}, "Empty": [], "Zero": 0},
    "Ports": {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}], "90/tcp": None},
    "Ratio": 1.5,
    "Matrix": [[1, 2], [3]],
}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("plain", "plain"),
        ("{{.Name}}-{{ .ID }}", "/web-0123"),
        ("{{.State.Running}} {{.State.Pid}} {{.Ratio}}", "true 42 1.5"),
        ("{{.Args}} {{.Config.Labels}}", "[a b c] map[a:1 b:2]"),
        ("{{json .Args}} {{json .Config.Labels}} {{json .State.Health}}", '["a","b c"] {"a":"1","b":"2"} null'),
        ("{{.Config.Labels | json}}", '{"a":"1","b":"2"}'),
        ('{{join .Args ", "}}', "a, b c"),
        ('{{index .Args 1}} {{index .Config.Labels "a"}}', "b c 1"),
        ('{{(index (index .Ports "80/tcp") 0).HostPort}}', "8080"),
        ("{{index .Matrix 0 1}}", "2"),
        ("{{len .Args}} {{len .Name}}", "2 4"),
        ("{{upper .Name}} {{lower `ABC`}} {{title \"ab cd\"}}", "/WEB abc Ab Cd"),
        ("{{range .Args}}[{{.}}]{{end}}", "[a][b c]"),
        ("{{range $i, $a := .Args}}{{$i}}={{$a}};{{end}}", "0=a;1=b c;"),
        ("{{range $k, $v := .Config.Labels}}{{$k}}:{{$v}} {{end}}", "a:1 b:2 "),
        ("{{range .Config.Empty}}x{{else}}none{{end}}", "none"),
        ("{{range $p, $conf := .Ports}}{{$p}} -> {{if $conf}}{{(index $conf 0).HostPort}}{{else}}-{{end}}\n{{end}}",
         "80/tcp -> 8080\n90/tcp -> -\n"),
        ("{{if .State.Running}}up{{else}}down{{end}}", "up"),
        ("{{if eq .ID \"x\"}}1{{else if eq .ID \"0123\"}}2{{else}}3{{end}}", "2"),
        ("{{if and .State.Running (gt .State.Pid 1)}}y{{end}}", "y"),
        ("{{or .Config.Zero .Name}} {{and .Config.Zero .Name}} {{not .Config.Zero}}", "/web 0 true"),
        ("{{eq .ID \"a\" \"0123\"}} {{ne .State.Pid 42}} {{lt 1 2}} {{le 2 2}} {{ge 1 2}}", "true false true true false"),
        ("{{with .State}}{{.Pid}}{{end}}{{with .Config.Empty}}x{{else}}y{{end}}", "42y"),
        ("{{$x := .Name}}{{$x}}{{$x = .ID}}{{$x}}", "/web0123"),
        ("{{with .State}}{{$.Name}}{{end}}", "/web"),
        ("a {{- .ID -}} b", "a0123b"),
        ("{{/* nothing }} here */}}x", "x"),
        ("{{printf \"%-6s|%03d|%q\" .ID .State.Pid \"a\"}}", '0123  |042|"a"'),
        ("{{println .ID}}", "0123\n"),
        ("{{.State.Health}}", "<no value>"),
        ("{{\"}}\"}}", "}}"),
        ('{{"a\\tb\\u0041"}}', "a\tbA"),
        ("{{slice .ID 1 3}} {{split \"a,b\" \",\"}} {{truncate .ID 2}} {{pad \"x\" 1 2}}|", "12 [a b] 01  x  |"),
        ("{{range .Args}}{{if eq . \"b c\"}}{{break}}{{end}}{{.}}{{end}}", "a"),
        ("{{range .Args}}{{if eq . \"a\"}}{{continue}}{{end}}{{.}}{{end}}", "b c"),
        ("{{print 1 2 \"a\"}}", "1 2a"),
    ],
)  # fmt: skip
def test_renders_as_go_does(source: str, expected: str) -> None:
    assert Template(source).render(DATA) == expected


@pytest.mark.parametrize(
    "source",
    ["{{", "{{.Name", "{{end}}", "{{if .x}}", "{{nope .Name}}", "{{}}", "{{.Name |}}", "{{(.Name}}", '{{"x}}', "{{else}}", "{{break}}",
     "{{.a .b)}}", "{{if}}{{end}}", "{{1x}}", "{{/* x }}", "{{template \"x\"}}", "{{#}}"],
)  # fmt: skip
def test_malformed(source: str) -> None:
    with pytest.raises(TemplateError):
        Template(source)


@pytest.mark.parametrize(
    "source",
    ["{{.Nope}}", "{{.Name.x}}", "{{index .Args 9}}", "{{.State.Health.Status}}", "{{len 1}}", "{{join .Name}}", "{{$x}}", "{{lt 1 \"a\"}}",
     "{{.Name .ID}}", "{{upper 1}}", "{{range .ID}}{{end}}"],
)  # fmt: skip
def test_what_the_data_does_not_have(source: str) -> None:
    with pytest.raises(TemplateError):
        Template(source).render(DATA)


@given(st.text(alphabet="{}.|()$\"`'- abNxif:=end,1/*\\", max_size=30))
def test_any_text_renders_or_is_refused(source: str) -> None:
    try:
        assert isinstance(Template(source).render(DATA), str)
    except TemplateError:
        pass


@given(st.text(alphabet=st.characters(blacklist_characters="{}"), max_size=40))
def test_text_without_actions_is_itself(source: str) -> None:
    assert Template(source).render({}) == source


def test_fields_used() -> None:
    assert Template("{{.ID}} {{if .Size}}{{.Names}}{{end}}").fields() == {"ID", "Size", "Names"}


STRUCT = Struct(
    {"Status": "status", "From": "from", "Actor": "Actor"},
    {"status": "start", "Actor": Struct({"ID": "ID", "Attributes": "Attributes"}, {"ID": "1", "Attributes": Texts(b="2", a="1")})},
)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{.Actor.Attributes.a}}{{.Actor.Attributes.name}}", "1<no value>"),
        ('[{{index .Actor.Attributes "a"}}{{index .Actor.Attributes "name"}}]', "[1]"),
        ("{{if .Actor.Attributes.name}}y{{else}}n{{end}}{{with .Actor.Attributes.a}}{{.}}{{end}}", "n1"),
        ("{{.Status}} [{{.From}}]", "start []"),
        ("{{json .}}", '{"status":"start","Actor":{"ID":"1","Attributes":{"a":"1","b":"2"}}}'),
        ("{{json .Actor.Attributes.name}}", "null"),
        ("{{.}}", "{start  {1 map[a:1 b:2]}}"),
    ],
)
def test_structs_and_maps_of_text_are_go_s(source: str, expected: str) -> None:
    assert Template(source).render(STRUCT) == expected


@pytest.mark.parametrize("source", ["{{.status}}", "{{.Nope}}", "{{.Actor.Attributes.name.x}}", "{{upper .Actor.Attributes.name}}"])
def test_a_struct_has_no_other_fields(source: str) -> None:
    with pytest.raises(TemplateError):
        Template(source).render(STRUCT)
