"""What can be ported is found; what cannot is refused with a reason."""

import pytest

from porter.model import PorterError
from porter.source.library import Library
from porter.targets import all_targets, find_target

FILES = {
    "__init__.py": "from .models import FooTransformer2DModel, FooUNet, Helper\n"
    "from .pipelines import BarPipeline, FooPipeline, OldPipeline, UNetPipeline\n",
    "models/__init__.py": "from .transformers.foo import FooTransformer2DModel\nfrom .unets.unet import FooUNet, Helper\n",
    "models/transformers/__init__.py": "",
    "models/transformers/foo.py": "import torch.nn as nn\n\n\nclass FooTransformer2DModel(nn.Module):\n    pass\n",
    "models/unets/__init__.py": "",
    "models/unets/unet.py": "import torch.nn as nn\n\n\nclass FooUNet(nn.Module):\n    pass\n\n\nclass Helper:\n    pass\n",
    "pipelines/__init__.py": "from .foo import BarPipeline, FooPipeline, UNetPipeline\n"
    "from .deprecated.old import OldPipeline\n",
    "pipelines/pipeline_utils.py": "class DiffusionPipeline:\n    pass\n",
    "pipelines/deprecated/__init__.py": "",
    "pipelines/foo.py": "from ..models import FooTransformer2DModel, FooUNet\n"
    "from .pipeline_utils import DiffusionPipeline\n\n\n"
    "class FooPipeline(DiffusionPipeline):\n"
    "    def __init__(self, vae, transformer: FooTransformer2DModel, second: FooTransformer2DModel | None = None): ...\n\n\n"
    "class BarPipeline(FooPipeline):\n    pass\n\n\n"
    "class UNetPipeline(DiffusionPipeline):\n    def __init__(self, unet: FooUNet): ...\n",
    "pipelines/deprecated/old.py": "from ..foo import FooPipeline\n\n\nclass OldPipeline(FooPipeline):\n    pass\n",
}
DENOISER = "diffusers.models.transformers.foo.FooTransformer2DModel"


@pytest.fixture
def library(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "diffusers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Library(tmp_path / "diffusers", "0.0.0")


def refused(library, name):
    with pytest.raises(PorterError) as error:
        find_target(library, name)
    (found,) = error.value.diagnostics
    return found


@pytest.mark.parametrize("name", ["FooPipeline", "diffusers.FooPipeline", "diffusers.pipelines.foo.FooPipeline"])
def test_a_pipeline_is_found_by_each_of_its_names(library, name):
    target = find_target(library, name)
    assert (target.name, target.is_pipeline, target.qualified) == (
        "FooPipeline",
        True,
        "diffusers.pipelines.foo.FooPipeline",
    )


def test_each_component_that_is_a_transformer_is_a_denoiser_and_no_other(library):
    assert find_target(library, "FooPipeline").denoisers == {"transformer": DENOISER, "second": DENOISER}


def test_a_constructor_may_be_inherited(library):
    assert find_target(library, "BarPipeline").denoisers == {"transformer": DENOISER, "second": DENOISER}


def test_a_denoiser_alone_is_no_pipeline(library):
    target = find_target(library, "FooTransformer2DModel")
    assert not target.is_pipeline
    assert target.denoisers == {"transformer": DENOISER}


def test_an_unknown_class_is_refused_with_the_names_near_it(library):
    found = refused(library, "FooPipelin")
    assert found.code == "PORT003"
    assert "FooPipeline" in found.advice


def test_a_name_like_nothing_gets_no_advice(library):
    found = refused(library, "Zzzzzz")
    assert (found.code, found.advice) == ("PORT003", None)


def test_a_module_is_no_class(library):
    assert refused(library, "diffusers.pipelines.foo").code == "PORT003"


def test_a_class_of_another_kind_is_refused(library):
    assert refused(library, "Helper").code == "PORT004"


def test_a_model_that_is_no_transformer_is_not_taken_for_a_denoiser(library):
    assert refused(library, "FooUNet").code == "PORT004"


def test_a_pipeline_without_a_transformer_is_refused_and_shown(library):
    found = refused(library, "UNetPipeline")
    assert found.code == "PORT005"
    assert found.span.file == "pipelines/foo.py"


def test_the_catalogue_has_neither_deprecated_pipelines_nor_those_without_a_transformer(library):
    assert [t.name for t in all_targets(library)] == ["BarPipeline", "FooPipeline"]
