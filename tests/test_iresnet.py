"""φ of the identity loss: recognisers read from their ONNX files."""

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from tiny import lively
from torch import nn

from facesnap.mini.checkpoint import store_half
from facesnap.mini.nets.landmarks import LandmarkNet, export_landmarks
from facesnap.mini.nets.recogniser import RECOGNISERS, RecogniserNet, export_recogniser
from facesnap.training.iresnet import IResNet


class PublicBlock(nn.Module):
    """A block as InsightFace's public IResNet names and orders its layers."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.prelu = nn.PReLU(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.downsample = None
        if stride != 1 or inner != outer:
            self.downsample = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x):
        out = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return out + (x if self.downsample is None else self.downsample(x))


class PublicIResNet(nn.Module):
    """The recogniser of buffalo_l at any width: w600k_r50 has widths 64, 64, 128, 256, 512 and these depths."""

    def __init__(self, widths=(8, 8, 12, 16, 20), depths=(3, 4, 14, 3)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU(widths[0])
        blocks = []
        for inner, outer, depth in zip(widths[:-1], widths[1:], depths, strict=True):
            blocks += [PublicBlock(inner if k == 0 else outer, outer, 2 if k == 0 else 1) for k in range(depth)]
        self.layers = nn.Sequential(*blocks)
        self.bn2 = nn.BatchNorm2d(widths[-1])
        self.dropout = nn.Dropout(0)
        self.fc = nn.Linear(widths[-1] * 49, 512)
        self.features = nn.BatchNorm1d(512)

    def forward(self, x):
        x = self.layers(self.prelu(self.bn1(self.conv1(x))))
        return self.features(self.fc(self.dropout(torch.flatten(self.bn2(x), 1))))


def export(net: nn.Module, path, **options):
    example = torch.zeros(1, 3, 112, 112)
    torch.onnx.export(
        net, (example,), str(path), input_names=["input.1"], dynamic_axes={"input.1": {0: "None"}},
        opset_version=11, dynamo=False, **options,
    )  # fmt: skip
    return path


def test_the_public_iresnet_50_is_read_from_its_onnx_file(tmp_path):
    net = lively(PublicIResNet())
    path = export(net, tmp_path / "w600k_r50.onnx")
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("BatchNormalization") == 24 + 2 and kinds.count("PRelu") == 25  # the others are folded
    ours = IResNet.from_onnx(path)
    crops = torch.rand(2, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        expected, found = net(crops), ours(crops)
    assert len(ours.blocks) == 24 and not ours.mirror
    torch.testing.assert_close(F.normalize(found), F.normalize(expected), atol=1e-4, rtol=0)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_a_file_whose_norms_were_not_folded_is_read_too(tmp_path):
    net = lively(PublicIResNet((4, 4, 4, 4, 4), (1, 1, 1, 1)))
    path = export(net, tmp_path / "raw.onnx", training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False)
    assert [n.op_type for n in onnx.load(path).graph.node].count("BatchNormalization") > 6
    crops = torch.rand(1, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(IResNet.from_onnx(path)(crops), net(crops), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_the_minis_recogniser_is_read_from_its_onnx_file(tmp_path, half):
    net = lively(RecogniserNet(**RECOGNISERS["B"]))
    path = tmp_path / "recogniser_B.onnx"
    export_recogniser(net, path)
    if half:
        store_half(path)
    ours = IResNet.from_onnx(path)
    crops = torch.rand(2, 3, 112, 112) * 2 - 1
    told = onnxruntime.InferenceSession(path).run(None, {"input": crops.numpy()})[0]
    assert ours.mirror
    torch.testing.assert_close(F.normalize(ours(crops)), F.normalize(torch.from_numpy(told)), atol=1e-4, rtol=0)


def test_a_file_that_is_no_recogniser_is_refused(tmp_path):
    (tmp_path / "damaged.onnx").write_bytes(b"not a graph")
    export_landmarks(LandmarkNet((8, 8, 8, 8, 8), 8), tmp_path / "landmarks.onnx")
    for name in ("damaged.onnx", "landmarks.onnx"):
        with pytest.raises(ValueError, match=f"{name} is no IResNet"):
            IResNet.from_onnx(tmp_path / name)
    with pytest.raises(ValueError, match="there is no recogniser at"):
        IResNet.from_onnx(tmp_path / "missing.onnx")
