"""What the engine inspector's JSON says of attention, and what a build does with it. The JSON has TensorRT's layout."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from build import build_student, finish_engine, tensorrt_engine
from build.build_student import Config
from build.engine_inspector import read_attention, softmax_nodes
from build.gate import GateLimits
from build.releases import manifest, versions
from build.triton_config import ServingLimits
from ranking.errors import InputError, Refused

SOFTMAXES = ["node_softmax", "node_softmax_1"]


def layer(name: str, kind: str, tactic: str = "", nodes: tuple[str, ...] = (), **fields) -> dict:
    """A layer as TensorRT 10 and 11 write it under the verbosity DETAILED."""
    tensor = {"Name": f"{name}_out", "Dimensions": [-1, 12, -1, 64], "Format/Datatype": "Half"}
    marks = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return {
        "Name": name, "LayerType": kind, "Inputs": [tensor], "Outputs": [tensor], "ParameterType": "Unknown",
        "TacticName": tactic, "StreamId": 0, "Metadata": marks, **fields,
    }  # fmt: skip


def attention(number: int, fused: bool, profile: str = "", softmaxes: list[str] = SOFTMAXES) -> list[dict]:
    """One attention as its kernels: the mask by itself, then one fused kernel, or products and softmax apart."""
    softmax = softmaxes[number]
    product, mask, context = f"node_MatMul_{2 * number}", f"node_where_{number}", f"node_MatMul_{2 * number + 1}"
    mask_layer = layer(f"__myl_CasSel_myl0_{number}{profile}", "kgen", "__myl_CasSel_0x1", (mask,))
    if fused:
        name, tactic = f"_gemm_mha_v2_myl0_{number}{profile}", "_gemm_mha_v2_0x957a2fe283f77dcf35c142c1390a3e6a"
        return [mask_layer, layer(name, "kgen", tactic, (product, softmax, context))]
    gemm = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16"
    return [
        layer(f"{product}_myl0_{number}{profile}", "gemm", gemm, (product,)),
        mask_layer,
        layer(f"__myl_CasMaxSubExpSum_myl0_{number}{profile}", "kgen", "__myl_CasMaxSubExpSum_0x2", (softmax,)),
        layer(f"__myl_DivMulCas_myl0_{number}{profile}", "kgen", "__myl_DivMulCas_0x3", (softmax,)),
        layer(f"{context}_myl0_{number}{profile}", "gemm", gemm, (context,)),
    ]


def information(*layers: dict | str) -> str:
    return json.dumps({"Layers": list(layers), "I/O Tensors": [{"Name": "input_ids", "IOMode": "Input"}]})


def test_an_engine_with_a_fused_kernel_for_each_softmax_is_fused():
    report = read_attention(information(*attention(0, True), *attention(1, True)), SOFTMAXES)
    assert report.all_fused and (report.layers, report.softmaxes) == (4, 2)
    assert report.fused == ["_gemm_mha_v2_myl0_0", "_gemm_mha_v2_myl0_1"]
    assert report.line() == "attention is fused: 2 kernels for 2 softmax nodes of the graph"


def test_both_halves_of_a_softmax_that_was_left_alone_are_named_and_the_mask_is_not():
    report = read_attention(information(*attention(0, True), *attention(1, False)), SOFTMAXES)
    assert not report.all_fused and report.unknown == []
    assert report.unfused == ["__myl_CasMaxSubExpSum_myl0_1", "__myl_DivMulCas_myl0_1"]
    assert "2 layers compute softmax outside a fused kernel: __myl_CasMaxSubExpSum_myl0_1, __myl_Div" in report.line()


def test_a_softmax_layer_outside_myelin_counts_whatever_its_metadata_say():
    plain = layer("softmax", "SoftMax", "", TacticValue="0x3e9")
    report = read_attention(information(*attention(0, True), *attention(1, True), plain), SOFTMAXES)
    assert report.unfused == ["softmax"] and not report.all_fused


def test_a_layer_that_moves_a_fused_softmaxs_result_is_not_a_softmax():
    moved = layer("__myl_MoveReshTran_myl0_7", "kgen", "__myl_MoveReshTran_0x4", ("node_softmax", "node_transpose"))
    assert read_attention(information(*attention(0, True), moved, *attention(1, True)), SOFTMAXES).all_fused


def test_an_attention_that_is_fused_in_one_profile_alone_is_not_fused():
    layers = [*attention(0, True), *attention(1, True)]
    layers += [*attention(0, True, " [profile 1]"), *attention(1, False, " [profile 1]")]
    report = read_attention(information(*layers), SOFTMAXES)
    assert [name.rpartition("_")[2] for name in report.unfused] == ["1 [profile 1]"] * 2 and len(report.fused) == 3


def test_a_subgraph_that_is_one_layer_tells_nothing_of_its_softmax():
    whole = layer("{ForeignNode[node_embedding...node_Tanh]}", "Myelin", "", ("node_embedding", *SOFTMAXES))
    report = read_attention(information(whole), SOFTMAXES)
    assert (report.unfused, report.unknown, report.all_fused) == ([], SOFTMAXES, False)


def test_a_softmax_kernel_counts_although_another_profile_without_a_mark_fused_that_node():
    report = read_attention(information(*attention(0, True), *attention(1, True), *attention(1, False)), SOFTMAXES)
    assert report.unfused == ["__myl_CasMaxSubExpSum_myl0_1"]


def test_what_no_layer_speaks_of_is_unknown_and_not_fused():
    report = read_attention(information(*attention(0, True)), SOFTMAXES)
    assert (report.unfused, report.unknown, report.all_fused) == ([], ["node_softmax_1"], False)
    assert "no layer says how 1 softmax nodes are computed: node_softmax_1" in report.line()


@pytest.mark.parametrize("kernels, fused", [(2, True), (1, False)])
def test_without_metadata_the_fused_kernels_are_counted(kernels, fused):
    layers = [layer("embeddings", "Gather")]
    layers += [{**layer(f"_gemm_mha_v2_myl0_{n}", "kgen"), "Metadata": ""} for n in range(kernels)]
    assert read_attention(information(*layers), SOFTMAXES).all_fused is fused


def test_a_message_names_a_few_layers_and_the_manifest_all():
    many = [layer(f"softmax_{n}", "SoftMax") for n in range(12)]
    report = read_attention(information(*many), [])
    assert report.line().endswith("softmax_3, softmax_4 and 7 more") and len(report.as_json()["unfused"]) == 12


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Name: a, LayerType: kgen", "not the JSON of TensorRT's engine inspector: 'Name: a"),
        ('{"Bindings": ["input_ids"]}', "not the JSON"),
        ('{"Layers": []}', "names no layer: build the engine with verbosity DETAILED"),
        ('{"Layers": ["_gemm_mha_v2_myl0_4"]}', "gives names alone: build the engine with verbosity DETAILED"),
    ],
)
def test_what_is_not_the_inspectors_detailed_json_is_refused(text, reason):
    with pytest.raises(InputError, match=reason):
        read_attention(text, SOFTMAXES)


def test_the_inspector_is_asked_for_json_of_the_engine_that_was_written(tmp_path, monkeypatch):
    """A stand-in for the library, which needs a GPU."""
    asked = []
    inspector = SimpleNamespace(get_engine_information=lambda form: asked.append(form) or "{}")
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    library = ModuleType("tensorrt")
    library.LayerInformationFormat = SimpleNamespace(JSON="json", ONELINE="oneline")
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    import polygraphy.backend.trt

    monkeypatch.setattr(polygraphy.backend.trt, "EngineFromBytes", lambda read: lambda: asked.append(read()) or engine)
    (tmp_path / "model.plan").write_bytes(b"an engine")
    assert tensorrt_engine.engine_information(tmp_path / "model.plan") == "{}"
    assert asked == [b"an engine", "json"]


@pytest.mark.skipif(tensorrt_engine.is_available(), reason="TensorRT is installed: the build is finished by it")
def test_a_build_records_what_the_inspector_says_and_refuses_unfused_attention_where_asked_to(
    checkpoint, data, tmp_path, monkeypatch, caplog
):
    """The cast graph in ONNX Runtime stands for the engine; the staging and the publication are real."""
    found = ""

    def warnings() -> list[str]:
        records = [record for record in caplog.records if record.name == finish_engine.LOGGER.name]
        return [record.getMessage() for record in records if record.levelname == "WARNING"]

    def build_engine(graph: Path, folder: str, *_) -> Path:
        return Path(shutil.copy(graph, Path(folder) / tensorrt_engine.PLAN_FILE))

    monkeypatch.setattr(tensorrt_engine, "build_engine", build_engine)
    monkeypatch.setattr(tensorrt_engine, "engine_runner", lambda path, plan: tensorrt_engine.cast_runner(path))
    monkeypatch.setattr(tensorrt_engine, "engine_information", lambda path: found)
    settings = {"gate": GateLimits(min_tau=0.97, max_ndcg_change=0.02), "serving": ServingLimits(half_softmax=True)}
    build_student.main(Config(checkpoint, "student", "tensorrt", data, staging=tmp_path, **settings))
    staged = tmp_path / "student"
    nodes = softmax_nodes(staged / "cast.onnx")
    finish = finish_engine.Config(staged, repository=tmp_path / "models")

    found = information(*attention(0, True, softmaxes=nodes), *attention(1, True, softmaxes=nodes))
    assert finish_engine.finish(finish) == 1
    kept = manifest(tmp_path / "models", "student", 1)
    assert kept["attention"] == {
        "layers": 4, "softmaxes": 2, "unfused": [], "unknown": [],
        "fused": ["_gemm_mha_v2_myl0_0", "_gemm_mha_v2_myl0_1"],
    }  # fmt: skip
    assert kept["serving"]["half_softmax"] is True and not warnings()

    found = information(*attention(0, True, softmaxes=nodes), *attention(1, False, softmaxes=nodes))
    assert finish_engine.finish(finish) == 2
    assert len(manifest(tmp_path / "models", "student", 2)["attention"]["unfused"]) == 2
    (warning,) = warnings()
    assert "2 layers compute softmax outside a fused kernel: __myl_CasMax" in warning
    assert "--serving.half-softmax" in warning

    found = '{"layers": "written in another way"}'
    assert finish_engine.finish(finish) == 3
    assert manifest(tmp_path / "models", "student", 3)["attention"]["unknown"] == nodes
    assert "not the JSON of TensorRT's engine inspector" in warnings()[1]

    facts = json.loads((staged / "stage.json").read_text())
    facts["gate_limits"]["require_fused_attention"] = True
    (staged / "stage.json").write_text(json.dumps(facts))
    with pytest.raises(Refused, match="student is not published: attention is not known to be fused throughout"):
        finish_engine.finish(finish)
    assert versions(tmp_path / "models", "student") == [1, 2, 3]
