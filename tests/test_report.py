"""The report: one page that shows what a recipe did, held against the programs themselves and the rules of HTML."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from math import prod
from pathlib import Path
from typing import Any

import pytest

import depthc
from depthc.codegen.dump.figures import LENGTHS, rows_of
from depthc.codegen.dump.key import key_html
from depthc.codegen.dump.parts import MOST_PARTS
from depthc.codegen.dump.picture import picture
from depthc.codegen.dump.report import report_html
from depthc.codegen.dump.sets import Sets
from depthc.codegen.dump.story import story
from depthc.codegen.dump.words import Scope, brief, chosen, inferred, short
from depthc.ir.cost.sizes import sizes_of
from depthc.ir.evaluate import indexed
from depthc.ir.params import Ref
from depthc.ir.program import Call, Loop, On, Program, Select, Stack, Tap
from depthc.ir.text.functions import walk
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of
from depthc.passes.stages import Stage, stages_of

from .test_picture import contrast

GOLDEN = Path(__file__).parent / "golden" / "report_mor.svg"
MEAN = " + mean.dim(memory, [1], True)"
BLOCK = """\
@block
def {name}(h: f32[b, {size}, 8]{sides}):
    w.norm.weight: f32[8]
    w.qkv.weight: f32[24, 8]
    w.up.weight: f32[32, 8]
    w.down.weight: f32[8, 32]
    qkv = chunk(linear(layer_norm(h, [8], w.norm.weight), w.qkv.weight), 3, -1)
    q = unsqueeze(qkv[0], 1)
    k = unsqueeze(qkv[1], 1)
    u = unsqueeze(qkv[2], 1)
    y = h{plus} + squeeze.dim(scaled_dot_product_attention(q, k, u, None, 0.0, {causal}), 1)
    return y + linear(gelu(linear(y, w.up.weight)), w.down.weight)
"""
DECODER = f"""\
# depthc program 1

@segment
def embed(ids: i64[b, s]):
    w.embed.weight: f32[10, 8]
    return embedding(w.embed.weight, ids)

{BLOCK.format(name="layer", size="s", sides="", plus="", causal=True)}
@segment
def head(h: f32[b, s, 8]):
    w.embed.weight: f32[10, 8]
    return linear(h, w.embed.weight)

def Tiny(ids: i64[b, s]):
    sizes(1 <= b, 1 <= s <= 4096)
    h = embed(ids)
    with stack("layers"):
        for l in range(LAYERS):
            h = layer(h, w=f"layers.{{l}}")
    logits = head(h)
    return logits
"""
TOWERS = f"""\
# depthc program 1

@segment
def embed(ids: i64[b, s]):
    w.embed.weight: f32[10, 8]
    return embedding(w.embed.weight, ids)

{BLOCK.format(name="lower", size="s", sides="", plus="", causal=False)}
@segment
def bridge(h: f32[b, s, 8], decoder_ids: i64[b, t]):
    w.embed.weight: f32[10, 8]
    return h, embedding(w.embed.weight, decoder_ids)

{BLOCK.format(name="upper", size="t", sides=", memory: f32[b, s, 8]", plus=MEAN, causal=True)}
@segment
def head(h: f32[b, t, 8]):
    w.embed.weight: f32[10, 8]
    return linear(h, w.embed.weight)

def Towers(ids: i64[b, s], decoder_ids: i64[b, t]):
    sizes(1 <= b, 1 <= s, 1 <= t)
    h = embed(ids)
    with stack("encoder"):
        for l in range(2):
            h = lower(h, w=f"encoder.{{l}}")
    memory, d = bridge(h, decoder_ids)
    with stack("decoder"):
        for l in range(4):
            d = upper(d, memory, w=f"decoder.{{l}}")
    logits = head(d)
    return logits
"""
RECIPES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "identity": (3, "identity", {}),
    "tie": (2, "tie", {}),
    "sequence": (8, 'tie(sharing="sequence")', {}),
    "there and back": (6, 'tie(sharing="cycle_rev")', {}),
    "averages": (8, 'tie(loops=3, sharing="middle_cycle", init="average")', {}),
    "fresh": (4, 'tie(init="random")', {}),
    "own norms": (8, 'tie(loops=3, sharing="middle_cycle", norms="per_depth")', {}),
    "mor": (8, "mor", {}),
    "mor that shares keys": (8, "mor", {"kv": "share_first"}),
    "mor_token": (8, "mor_token", {}),
    "mod": (8, "mod", {}),
    "one routed layer": (4, "mod", {"layers": (2,)}),
    "two routed layers": (4, "mod", {"layers": (1, 2)}),
    "keep": (4, "keep(capacities=(1.0, 0.75, 0.5, 0.25))", {}),
    "80 layers": (80, "mor", {}),
}
EVERY = [*RECIPES, "towers", "80 layers, mod"]
QUICK = ("tie", "mor", "towers")
PAGES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES if name not in QUICK)]


@cache
def program(layers: int) -> Program:
    return depthc.parse(DECODER.replace("LAYERS", str(layers)))


def applied(source: Program, recipe: str, **options: Any) -> tuple[Stage, ...]:
    return stages_of(source, run_recipe(source, recipe_of(recipe, options))[1])


@cache
def stages(name: str) -> tuple[Stage, ...]:
    if name == "towers":
        return applied(depthc.parse(TOWERS), "tie")
    layers, recipe, options = RECIPES.get(name, (80, "mod", {}))
    return applied(program(layers), recipe, **options)


@cache
def page(name: str) -> str:
    return report_html(stages(name), name)


@cache
def drawn(name: str) -> Page:
    """The pictures and their key, without the costs."""
    first, last = stages(name)[0].program, stages(name)[-1].program
    sets = Sets(first, last)
    svgs = [picture(source, sets, title) for source, title in ((first, "captured"), (last, "after"))]
    return Page("\n".join([*svgs, key_html(first, last, sets)]))


class Page(HTMLParser):
    """A page as a browser's strictest reader takes it: every element is closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, Mapping[str, str | None]]] = []
        self.tags: list[tuple[str, Mapping[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.style = ""
        self.cells: list[dict[str, Any]] = []  # of layers, in the pictures
        self.picture = -1
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append((tag, dict(attrs)))
        classes = (dict(attrs).get("class") or "").split()
        self.picture += "picture" in classes
        if tag == "g" and "cell" in classes and self.inside("picture"):
            self.cells.append({"picture": self.picture, "classes": classes, "texts": [], "title": ""})

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        where = self.open[-1][0] if self.open else ""
        self.texts.append((where, data))
        if where == "style":
            self.style += data
        if self.inside("cell") and self.inside("picture") and where in ("text", "title"):
            cell = self.cells[-1]
            cell["title" if where == "title" else "texts"] += data if where == "title" else [data]

    def inside(self, name: str) -> bool:
        return any(name in (attrs.get("class") or "").split() for _, attrs in self.open)

    def layers(self, number: int) -> list[dict[str, Any]]:
        """The boxes of layers of one picture."""
        return [cell for cell in self.cells if cell["picture"] == number and "glue" not in cell["classes"]]

    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(data for where, data in self.texts if where != "style"))


def tensors(source: Program, call: Call, loops: Mapping[str, Any]) -> tuple[frozenset[str], ...]:
    """What a call reads in each pass: weights, or parameters made of others; once if always the same."""
    found = []
    for n in range(min(loops.values(), default=1)):
        exprs = {name: source.params[name].expr for name in (indexed(p, dict.fromkeys(loops, n)) for p in call.params)}
        made = {k: e.name if isinstance(e, Ref) else f"{k} = {e}" if e else k for k, e in exprs.items()}
        found.append(frozenset(made.values()))
    return tuple(found if len(set(found)) > 1 else found[:1])


def groups(source: Program) -> list[tuple[frozenset[str], ...]]:
    return [tensors(source, op, loops) for op, loops in walk(source.body) if isinstance(op, Call)]


def size(source: Program, name: str) -> int:
    return prod(source.params[name].type.sizes({}))


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_whole_and_load_nothing(name: str) -> None:
    read = Page(page(name))
    assert not re.search(r"https?:|//|url\(|@import", page(name).replace("s//", ""))
    for tag, attrs in read.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "image", "use")
        assert not any(key.startswith("on") or key in ("src", "href", "style") for key in attrs)
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in read.tags:
        if attrs.get("role") == "img":
            assert tag == "svg"
            assert set((attrs["aria-labelledby"] or "").split()) <= set(ids)


@pytest.mark.parametrize("name", EVERY)
def test_every_layer_is_drawn_and_labels_say_what_is_shared(name: str) -> None:
    first, last = stages(name)[0].program, stages(name)[-1].program
    read = drawn(name)
    pairs = []
    for number, source in enumerate((first, last)):
        cells = read.layers(number)
        wanted = groups(source)
        assert len(cells) == len(wanted)
        pairs += [(group, cell) for group, cell in zip(wanted, cells, strict=True)]
    labels = {(group, cell["texts"][0]) for group, cell in pairs}
    assert len(labels) == len({group for group, _ in labels}) == len({label for _, label in labels})
    colours: dict[str, set[str]] = {}
    for _, cell in pairs:
        if "gone" not in cell["classes"]:
            colours.setdefault(cell["texts"][0], set()).add(cell["classes"][1])
    assert all(len(found) == 1 for found in colours.values())
    read_after = " ".join(one for passes in groups(last) for group in passes for one in group)
    for ((group,), cell), _ in zip(pairs, groups(first), strict=False):
        kept = sum(size(first, weight) for weight in group if re.search(rf"{weight}\b", read_after))
        assert ("gone" in cell["classes"]) == (2 * kept <= sum(size(first, weight) for weight in group))


@pytest.mark.parametrize("name", EVERY)
def test_every_loop_and_route_is_drawn(name: str) -> None:
    last = stages(name)[-1].program
    read = drawn(name)
    marks = Counter(attrs.get("class") for _, attrs in read.tags)
    ops = [op for op, _ in walk(last.body)]
    marked = [cell for cell in read.layers(1) if len(cell["texts"]) > 1]
    loops, regions = (sum(isinstance(op, kind) for op in ops) for kind in (Loop, On))
    brackets, frames = marks["bracket"] - (marks["bracket"] > 0), marks["region"] - (marks["region"] > 0)
    routed = [cell for cell in marked if "routed" in cell["classes"]]
    assert (brackets + len(marked) - len(routed), frames + len(routed)) == (loops, regions)
    text = read.text()
    for op in ops:
        if isinstance(op, Loop):
            assert f"\u00d7{op.count}" in text
        if isinstance(op, Tap):
            assert op.name.rpartition(".")[2].strip("{r}0123456789") in text


@pytest.mark.parametrize("name", [p for p in PAGES if p != "80 layers"])
def test_figures_are_those_of_the_costs(name: str) -> None:
    first, last = stages(name)[0], stages(name)[-1]
    costs = first.cost, last.cost
    rows = list(rows_of(costs, first.program, ((1, 2), (3, 4))))
    assert [row.values for row in rows[:2]] == [(1, 2), (3, 4)]
    assert rows[2].values == (first.cost.parameters, last.cost.parameters)
    assert rows[3].values == (first.cost.parameter_bytes, last.cost.parameter_bytes)
    for row in rows[4:]:
        sizes = {k: int(v.replace(",", "")) for k, v in re.findall(r"(\w+) = ([\d,]+)", row.name)}
        found = [cost.at(**sizes) for cost in costs]
        field = "flops" if row.name.startswith("FLOPs") else "cache_bytes"
        assert row.values == tuple(getattr(figures, field) for figures in found)
        assert row.at_most == tuple(figures.at_most for figures in found)
    cells = [data for where, data in Page(page(name)).texts if where in ("td", "th")]
    for row in rows[2:]:
        at_name = cells.index(row.name)
        for value, cell in zip(row.values, cells[at_name + 1 : at_name + 3], strict=True):
            assert cell.removeprefix("≤ ") == ("\u2013" if value is None else short(value, row.unit))
    if name == "mor_token":
        assert [row.at_most for row in rows[4:]] == [(False, True)] * len(rows[4:])
    if name == "keep":
        assert "compares tokens with later ones" in page(name)


def test_sizes_are_legal() -> None:
    guarded = replace(program(2), signature=replace(program(2).signature, guards=("s % 384 == 0",)))
    assert sizes_of(guarded, 2048) == {"b": 1, "s": 1920}
    assert [sizes_of(program(2), n)["s"] for n in LENGTHS] == [512, 2048, 4096]
    towers = stages("towers")[0].program
    assert sizes_of(towers, 512) == {"b": 1, "s": 512, "t": 512}
    never = replace(program(2), signature=replace(program(2).signature, guards=("s == 4097",)))
    assert sizes_of(never, 512) == {"b": 1, "s": 1}
    cost = stages("tie")[0].cost
    assert cost.among({"b": 1, "s": 7, "unread": 3}) == {"b": 1, "s": 7}


STORIES = {
    "identity": "All 3 layers stay as they are.",
    "tie": "2 layers became 1: one layer runs 2 times. It begins as layer 0.",
    "sequence": "8 layers became 4: each runs 2 times.",
    "averages": "8 layers became 4: the first and the last stay, and in place of the 6 in between one group of 2 layers"
    " runs 3 times.",
    "mor": "8 layers became 4: the first and the last stay, and in place of the 6 in between one group of 2 layers"
    " runs 3 times. They begin as layers 1 and 6. Not every token takes part: the group runs on all tokens in pass 1,"
    " then the best 2/3, then 1/3 of all by router among those of the pass before; the others stay as they are.",
    "mod": "The 8 layers keep their parameters and their order. 4 of the layers run only on the best 1/8 of the tokens"
    " by router (in inference: the tokens with a score above 0 by router); there, other tokens stay as they are.",
    "one routed layer": "The 4 layers keep their parameters and their order. Not every token takes part: layer 2 runs"
    " on the best 1/8 of the tokens by router; the others stay as they are.",
    "two routed layers": "The 4 layers keep their parameters and their order. Not every token takes part: layers 1 and"
    " 2 run on the best 1/8 of the tokens by router; the others stay as they are.",
    "towers": "In encoder: all 2 layers stay as they are. In decoder: 4 layers became 2: one group of 2 layers runs 2"
    " times. They begin as layers d0 and d3.",
}


@pytest.mark.parametrize("name", STORIES)
def test_stories(name: str) -> None:
    first, last = stages(name)[0].program, stages(name)[-1].program
    assert story(first, last, Sets(first, last)) == STORIES[name]
    if name in QUICK:
        assert STORIES[name] in Page(page(name)).text()


def test_stories_claim_no_more_than_is_so() -> None:
    before = program(4)
    (stack,) = before.stacks
    first, second, third, last = stack.ops

    def told(*ops: Any) -> str:
        body = tuple(replace(item, ops=ops) if isinstance(item, Stack) else item for item in before.body)
        after = replace(before, body=body)
        return story(before, after, Sets(before, after))

    twice = Loop("r", 2, (second,))
    assert "the first and the last stay" in told(first, twice, last)
    assert told(last, twice, first) == (
        "4 layers became 3: one layer runs 2 times, with 1 layer before it and 1 behind. It begins as layer 1."
    )
    assert told(Loop("q", 2, (Loop("r", 2, (second, third)),))) == "4 layers became 2: they are applied 8 times in all."
    assert told(Loop("r", 1, stack.ops)) == (
        "The 4 layers keep their parameters and their order, and what repeats is written as a loop."
    )


def test_what_new_sets_are_made_of_is_said() -> None:
    text = drawn("averages").text()
    assert "A the mean of 1, 3 and 5" in text
    assert "B the mean of 2, 4 and 6" in text
    assert "fresh values, those of 0 in another order" in drawn("fresh").text()
    assert "0/5 another set by pass: 0 and 5" in drawn("there and back").text()
    text = drawn("own norms").text()
    assert "1* 8 of its parameters are another set in every pass" in text
    assert "8 layers applied, 4 stored" in text
    assert "stored by the first application, read by later ones" in drawn("mor that shares keys").text()


RULES = {
    "topk(0.33)": ("the best 33% of the tokens by s", "33%"),
    "topk([0.5, 0.25][r])": ("the best 1/2, then 1/4 of all by s", "1/2"),
    "topk(0.5, warmup=100)": ("the best 1/2 of the tokens by s, falling from all over 100 steps", "1/2"),
    "threshold(-0.5)": ("the tokens with s above -0.5", "> -0.5"),
    "threshold([-inf, 0.0][r])": ("all tokens in pass 1, then the tokens with s above 0", "> -inf"),
    "atleast(r)": ("the tokens with s at least r", "≥ r"),
    "atleast(2)": ("the tokens with s at least 2", "≥ 2"),
    "stride(4)": ("one token in 4", "1/4"),
    "all": ("all tokens", "all"),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_in_words(rule: str) -> None:
    select, scope = Select("A", rule, "s"), Scope((Loop("r", 2, ()),))
    assert chosen(select, scope) == RULES[rule][0]
    assert brief(select, scope) == RULES[rule][1]
    assert inferred(select, scope) == ""
    assert inferred(replace(select, inference="threshold(1.0)", judge="j"), scope) == "the tokens with j above 1"


def test_documents_and_nested_choices_in_words() -> None:
    again = Select("active", "all", among="chosen")
    scope = Scope((Loop("r", 2, (again,)),), makers={"s": "router"})
    select = Select("A", "topk(0.5)", "s", among="active", within="ids")
    assert (
        chosen(select, scope) == "the best 1/2 of the tokens of every document by router among those of the pass before"
    )


def test_large_models_stay_small() -> None:
    for name in ("80 layers", "80 layers, mod"):
        heights = [float(attrs["height"] or 0) for _, attrs in drawn(name).tags if attrs.get("class") == "picture"]
        assert len(heights) == 2
        assert max(heights) < 800
    assert len(page("80 layers")) < 120_000


def test_what_would_be_long_is_left_out_with_a_word() -> None:
    uneven = program(2)
    (stack,) = uneven.stacks
    loops = tuple(Loop(f"r{n}", 2, (*stack.ops, *stack.ops)) for n in range(40))
    body = tuple(replace(item, ops=loops) if isinstance(item, Stack) else item for item in uneven.body)
    svg = picture(replace(uneven, body=body), Sets(uneven, uneven), "many")
    assert svg.count('class="bracket"') == MOST_PARTS - 2
    assert "30 parts more" in svg


def test_hostile_names_are_text() -> None:
    first, last = stages("one routed layer")
    bad = "<script>alert('&amp;')</script><img src=x onerror=\"y\">"
    renamed = []
    for stage in (first, last):
        params = {name.replace("embed.weight", bad): param for name, param in stage.program.params.items()}
        items = [
            replace(item, name=bad, **({} if isinstance(item, Stack) else {"params": tuple(bad for _ in item.params)}))
            for item in stage.program.body
        ]
        source = replace(stage.program, name=bad, params=params, body=tuple(items))
        renamed.append(replace(stage, title=bad, program=source))
    text = report_html(renamed, bad, {bad: bad})
    read = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in read.tags}
    assert read.text().count("alert('&amp;')") > 10


def test_missing_files_are_said_at_the_end() -> None:
    text = Page(report_html(stages("tie"), "tie", {"kernels.txt": "Triton is not here"})).text()
    assert text.rstrip().endswith("kernels.txt : Triton is not here")
    assert "What is not here" not in Page(page("tie")).text()


def test_a_program_without_a_history() -> None:
    text = Page(report_html(stages("identity"), "identity")).text()
    assert "no pass" in text
    assert "The passes" not in text


def test_passes_with_their_diffs() -> None:
    text = page("mor")
    for stage in stages("mor")[1:]:
        assert stage.step is not None
        assert f"{stage.number}. <code>{stage.title.replace(chr(34), '&quot;')}</code>" in text
        assert f"{stage.step.before} ops became {stage.step.after}" in text
        assert f"{len(stage.step.made)} parameters made or bound anew" in text
    assert '<span class="add">+             with on(chosen, reads=(h,), writes=(y,)):</span>' in text
    assert '<span class="gone">-         for l in range(8):</span>' in text


@pytest.mark.parametrize("name", ["mor", "towers"])
def test_text_is_deterministic(name: str) -> None:
    again = [replace(stage, program=replace(stage.program)) for stage in stages(name)]
    assert report_html(again, name) == page(name)


def test_letters_stand_out() -> None:
    style = Page(page("80 layers")).style
    light, dark = style.split("@media screen and (prefers-color-scheme: dark)")
    for scheme in (light, dark):
        values = dict(re.findall(r"--([\w-]+): (#\w{6});", scheme))
        pairs = [("ink", "page"), ("ink", "panel"), ("muted", "page"), ("muted", "panel")]
        for letters, back in [*pairs, ("add", "add-back"), ("gone", "gone-back")]:
            assert contrast(values[letters], values[back]) >= 4.5, (letters, back)
        boxes = re.findall(r"\.c\d+ rect \{ fill: (#\w+); \}.*?\.c\d+ text.*?fill: (#\w+);", scheme)
        assert len(boxes) > 60
        assert all(contrast(*box) >= 4.5 for box in boxes)


def golden() -> str:
    """The picture of the golden file."""
    first, last = stages("mor")[0].program, stages("mor")[-1].program
    return picture(last, Sets(first, last), "after") + "\n"


def test_the_picture_is_the_golden_one() -> None:
    if os.environ.get("DEPTHC_GOLDEN") == "write":
        GOLDEN.write_text(golden(), encoding="utf-8")
    assert golden() == GOLDEN.read_text(encoding="utf-8")
