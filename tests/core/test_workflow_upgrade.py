"""ComfyUI_ExtraModels workflows on this pack's nodes: whole documents, and nothing else touched."""

import copy
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from workflow_documents import (
    NAMES,
    PAGES,
    ROOT,
    alone,
    check_links,
    golden,
    levels,
    node,
    reason,
    value,
)

from pixart_core.workflow import upgrade
from pixart_core.workflow.extramodels import NOT_MAPPED, OLD_NODES
from pixart_core.workflow.targets import TARGETS

# every document


@pytest.mark.parametrize("name", PAGES)
def test_the_samples_are_sound(name):
    """check_links can be trusted: it accepts what was there before."""
    check_links(golden(name))


@pytest.mark.parametrize("name", PAGES)
def test_every_link_is_sound_afterwards(name):
    """Protects graphs from wires that hang in the air or join different types."""
    check_links(upgrade(golden(name))[0])


@pytest.mark.parametrize("name", NAMES)
def test_upgrading_twice_changes_nothing_more(name):
    once, first = upgrade(golden(name))
    twice, second = upgrade(once)
    assert twice == once
    assert not second.upgraded and [r.node for r in second.left] == [r.node for r in first.left]


@pytest.mark.parametrize("name", NAMES)
def test_no_old_node_goes_unnamed(name):
    """What is still there of the old pack is in the report with a reason."""
    before = golden(name)
    after, report = upgrade(before)
    assert before == golden(name), "the caller's document was changed"
    nodes = ([(n["id"], n["type"]) for level in levels(after) for n in level["nodes"]]
             if "nodes" in after else [(k, n["class_type"]) for k, n in after.items()])
    still = {number for number, type_name in nodes
             if type_name in OLD_NODES or type_name in NOT_MAPPED}
    assert still == {row.node for row in report.left}
    assert all(row.notes and row.notes[0] for row in report.left)


@pytest.mark.parametrize("name", PAGES)
def test_other_nodes_places_and_groups_stay(name):
    before, (after, report) = golden(name), upgrade(golden(name))
    touched = {(row.place, row.node) for row in report.upgraded}
    for old, new in zip(levels(before), levels(after), strict=True):
        place = old.get("name", "")
        now = {n["id"]: n for n in new["nodes"]}
        assert old["groups"] == new["groups"]
        for n in old["nodes"]:
            if n["id"] not in now:
                assert (place, n["id"]) in touched
                continue
            for key in ("pos", "size", "mode", "flags", "order", "color", "bgcolor"):
                assert now[n["id"]].get(key) == n.get(key)
            if (place, n["id"]) not in touched and n["type"] in ("Note", "SaveImage", "KSampler"):
                assert now[n["id"]]["widgets_values"] == n["widgets_values"]


# what is left


@pytest.mark.parametrize(("number", "words"), [
    (1, "another model"), (2, "HYDiTTextEncoderLoader"), (3, "HYDiTTextEncode"), (5, "node 3"),
    (6, "MoVQ3"), (7, "PixArtHyper_3"), (8, "4 widget values"), (10, "LoadLatent"),
    (11, "node 10"), (13, "ConditioningCombine"), (15, "another model"), (16, "--cpu-vae"),
    (17, "CheckpointLoaderSimple")])
def test_what_is_left_says_why(number, words):
    before, (after, report) = golden("left"), upgrade(golden("left"))
    assert words in reason(report, number)
    assert node(after, number) == node(before, number)


@pytest.mark.parametrize("inputs", [
    {"ckpt_name": "a.pth", "model": ["9", 0]}, {"ckpt_name": "a.pth"},
    {"ckpt_name": "a.pth", "model": "PixArtMS_XL_2", "precision": "fp16"}])
def test_unknown_versions_of_a_node_are_left(inputs):
    new, kept, report = alone("PixArtCheckpointLoader", **inputs)
    assert new == "PixArtCheckpointLoader" and kept == inputs and report.left


def test_a_size_that_is_bypassed_is_left():
    document = golden("sigma_reroute")
    node(document, 8)["mode"] = 4
    after, report = upgrade(document)
    assert "bypassed" in reason(report, 8) and value(after, 5, "width") == 0


def test_group_nodes_are_named():
    document = {**golden("alpha_2023"),
                "extra": {"groupNodes": {"mine": {"nodes": [{"type": "T5TextEncode"}]}}}}
    _, report = upgrade(document)
    assert [(row.place, row.old) for row in report.left] == [("mine", "T5TextEncode")]


# subgraphs


def test_the_ends_of_a_subgraph_carry_clip():
    after, _ = upgrade(golden("subgraph"))
    [inside] = after["definitions"]["subgraphs"]
    assert inside["inputs"][0]["type"] == "CLIP"
    assert node(after, 2)["inputs"][0]["type"] == "CLIP"


def inside_a_subgraph(document):
    """The document as a subgraph's inside, with links as objects, and an empty page around it."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    level = {"id": "5a6f0f6e-7d0e-4a38-8f6a-2f1c3b9d1e78", "name": "all", "version": 1,
             "inputs": [], "outputs": [], "groups": document["groups"], "nodes": document["nodes"],
             "state": {"lastNodeId": document["last_node_id"],
                       "lastLinkId": document["last_link_id"]},
             "links": [dict(zip(names, row, strict=True)) for row in document["links"]]}
    return {"nodes": [{"id": 99, "type": level["id"], "inputs": [], "outputs": []}], "links": [],
            "groups": [], "last_node_id": 99, "last_link_id": 40, "version": 0.4,
            "definitions": {"subgraphs": [level]}}


@pytest.mark.parametrize("name", ["controlnet", "sigma_reroute", "sd3_clip", "left"])
def test_a_subgraph_is_upgraded_like_a_page(name):
    """Links are objects there, and further ids must be free in the whole document."""
    plain, flat = upgrade(golden(name))
    after, report = upgrade(inside_a_subgraph(golden(name)))
    check_links(after)
    [level] = after["definitions"]["subgraphs"]
    assert [(r.node, r.old, r.new) for r in report.rows] == [
        (r.node, r.old, r.new) for r in flat.rows]
    assert [n["type"] for n in level["nodes"]] == [n["type"] for n in plain["nodes"]]
    assert len({n["id"] for n in level["nodes"]} | {99}) == len(level["nodes"]) + 1
    highest = max([99, *(n["id"] for n in level["nodes"])])
    assert after["last_node_id"] >= highest and level["state"]["lastNodeId"] >= max(
        n["id"] for n in level["nodes"])
    assert all(isinstance(link, dict) for link in level["links"])


def test_rings_end():
    """Files that make no sense must not hang the command."""
    ring = {"last_node_id": 4, "last_link_id": 3, "version": 0.4, "groups": [], "links": [
        [1, 1, 0, 2, 0, "T5"], [2, 2, 0, 1, 0, "T5"], [3, 2, 0, 3, 0, "T5"]], "nodes": [
        {"id": 1, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 2}],
         "outputs": [{"name": "", "type": "T5", "links": [1]}]},
        {"id": 2, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 1}],
         "outputs": [{"name": "", "type": "T5", "links": [2, 3]}]},
        {"id": 3, "type": "T5TextEncode", "inputs": [{"name": "T5", "type": "T5", "link": 3}],
         "outputs": [], "widgets_values": ["a"]}]}
    assert upgrade(ring)[1].upgraded
    cond = {"class_type": "PixArtResolutionCond"}
    _, report = upgrade({
        "1": {**cond, "inputs": {"cond": ["2", 0], "width": 8, "height": 8}},
        "2": {**cond, "inputs": {"cond": ["1", 0], "width": 8, "height": 8}}})
    assert len(report.left) == 2


def test_widgets_shown_outside_are_renamed():
    after, _ = upgrade(golden("subgraph"))
    assert node(after, 2)["properties"]["proxyWidgets"] == [["4", "text"], ["5", "model_name"]]


# ids


def test_no_id_is_in_both_packs():
    """Two packs with one id: ComfyUI would keep the one that it reads last."""
    ours = {found for path in (ROOT / "nodes").glob("*.py")
            for found in re.findall(r'node_id="(\w+)"', path.read_text(encoding="utf-8"))}
    assert len(ours) >= 19 and not ours & (set(OLD_NODES) | set(NOT_MAPPED))
    assert {name for name, target in TARGETS.items() if not target.stock} <= ours


# everything else in a document

values = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
                      lambda inner: st.lists(inner, max_size=2), max_leaves=4)
others = st.fixed_dictionaries({
    "type": st.text(max_size=6).map("Other".__add__), "pos": st.lists(st.floats(-99, 99),
                                                                      min_size=2, max_size=2),
    "mode": st.sampled_from([0, 2, 4]), "widgets_values": st.lists(values, max_size=3),
    "properties": st.dictionaries(st.text(max_size=4), values, max_size=2),
    "anything": values})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(nodes=st.lists(others, max_size=4), extra=st.dictionaries(st.text(max_size=5), values),
       name=st.sampled_from(PAGES), data=st.data())
def test_foreign_nodes_come_through_untouched(nodes, extra, name, data):
    """Whatever else is in a document, wired among itself and to outputs of old nodes."""
    document = golden(name)
    first = document["last_node_id"] + 1
    sources = [n for n in document["nodes"] if n["outputs"]]
    for index, one in enumerate(nodes):
        origin = data.draw(st.sampled_from(sources))
        slot = data.draw(st.integers(0, len(origin["outputs"]) - 1))
        out = origin["outputs"][slot]
        if out["type"] == "T5":
            continue
        document["last_link_id"] += 1
        number = document["last_link_id"]
        one = {**one, "id": first + index, "outputs": [],
               "inputs": [{"name": "in", "type": "*", "link": number}]}
        document["nodes"].append(one)
        out["links"] = [*(out["links"] or []), number]
        document["links"].append([number, origin["id"], slot, one["id"], 0, out["type"]])
        document["last_node_id"] = one["id"]
    document["mine"] = extra
    before = copy.deepcopy(document)
    after, _ = upgrade(document)
    check_links(after)
    assert after["mine"] == extra
    now = {n["id"]: n for n in after["nodes"]}
    for one in before["nodes"]:
        if one["type"].startswith("Other"):
            assert now[one["id"]] == one
