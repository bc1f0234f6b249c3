"""Media that the engine process prepares, and what stays in the worker."""

from __future__ import annotations

from porter.pipeline import PipelinePort
from tests.pipeline.conftest import CALL, HEAD, INIT, Studio, printed

START = "        embeds = self.encode_prompt(prompt, lora_scale=lora_scale)\n"
RANDOM = "latents = torch.randn(1, 4, height // self.vae_scale_factor, generator=generator)"


def with_picture(
    studio: Studio, statements: str, methods: str = "", use: str = "picture", head: str = HEAD
) -> PipelinePort:
    """A pipeline that takes a picture and a mask, with these statements ahead of its latents."""
    call = CALL.replace("self, prompt:", "self, image=None, mask_image=None, prompt:")
    indented = "".join(f"        {line}\n" for line in statements.splitlines())
    call = call.replace(START, START + indented).replace(RANDOM, f"{RANDOM} + self.vae.encode({use})")
    return studio.port(head + INIT + methods + call)


def function_of(port: PipelinePort) -> str:
    text = printed(port)
    return text[text.index("def get_tiny_pre_process_func") : text.index("def get_tiny_post_process_func")]


def class_of(port: PipelinePort) -> str:
    text = printed(port)
    return text[text.index("class TinyPipeline") :]


def test_a_picture_is_prepared_ahead_of_the_worker_which_takes_it_where_it_is_there(studio: Studio) -> None:
    port = with_picture(studio, "picture = self.image_processor.preprocess(image, height=height)")
    assert port.pre_process == "get_tiny_pre_process_func"
    assert 'prepared["picture"] = image_processor.preprocess(image, height=height)' in function_of(port)
    taken = 'if "picture" in prepared_media:\n            picture = prepared_media["picture"]\n        else:\n'
    assert taken + "            picture = self.image_processor.preprocess(image, height=height)" in class_of(port)


def test_the_function_reads_json_and_no_model(studio: Studio) -> None:
    text = function_of(with_picture(studio, "picture = self.image_processor.preprocess(image, height=height)"))
    assert 'vae_config = read_json(od_config, "vae/config.json")' in text
    assert 'vae_scale_factor = vae_config["factor"]' in text
    assert "self." not in text and "load_component" not in text


def test_only_what_the_units_need_is_in_the_function(studio: Studio) -> None:
    text = function_of(with_picture(studio, "picture = self.image_processor.preprocess(image, height=height)"))
    assert "height = height or 64" in text
    assert "guidance_scale" not in text and "latents" not in text and "never_read" not in text


def test_the_part_of_a_statement_that_needs_the_device_stays(studio: Studio) -> None:
    port = with_picture(
        studio, "image = self.image_processor.preprocess(image).to(self._execution_device)", use="image"
    )
    assert 'prepared["image"] = image_processor.preprocess(image)' in function_of(port)
    assert "image = self.image_processor.preprocess(image)\n        image = image.to(self.device)" in class_of(port)


def test_a_branch_on_the_request_is_a_branch_in_the_function(studio: Studio) -> None:
    lines = "picture = None\nif image is not None:\n    picture = self.image_processor.preprocess(image)"
    text = function_of(with_picture(studio, lines))
    assert 'if image is not None:\n            prepared["picture"] = image_processor.preprocess(image)' in text


def test_a_method_that_prepares_is_followed(studio: Studio) -> None:
    method = """
    def prepare_image(self, picture, height, device):
        if not isinstance(picture, torch.Tensor):
            picture = self.image_processor.preprocess(picture, height=height)
        return picture.to(device)

"""
    port = with_picture(studio, "picture = self.prepare_image(image, height, self._execution_device)", method)
    assert 'prepared["image"] = image_processor.preprocess(image, height=height)' in function_of(port)
    text = class_of(port)
    assert "prepare_image(image, height, self.device, prepared_media=prepared_media)" in text
    assert 'if "image" in prepared_media:\n            picture = prepared_media["image"]' in text


def test_a_name_that_gets_another_value_is_not_read_for_its_copy(studio: Studio) -> None:
    method = """
    def prepare_image(self, picture, height, device):
        picture = self.image_processor.preprocess(picture, height=height)
        return picture.to(device)

"""
    lines = (
        "mask = image\nif height > 8:\n    mask = mask_image\n"
        "picture = self.prepare_image(mask, height, self._execution_device)\n"
        "mask = self.image_processor.preprocess(mask)"
    )
    text = function_of(with_picture(studio, lines, method, use="picture * mask"))
    assert "if height > 8:\n            mask = mask_image\n" in text
    assert 'prepared["mask"] = image_processor.preprocess(mask, height=height)' in text
    assert 'prepared["mask_2"] = image_processor.preprocess(mask)' in text


def test_a_method_without_an_object_can_be_called_from_the_function(studio: Studio) -> None:
    method = "\n    def longer(self, pictures, count):\n        return pictures * count\n\n"
    port = with_picture(studio, "picture = self.image_processor.preprocess(self.longer(image, 2))", method)
    assert "image_processor.preprocess(TinyPipeline.longer(image, 2))" in function_of(port)
    assert "@staticmethod\n    def longer(pictures, count):" in class_of(port)


def test_the_class_of_a_component_is_the_one_that_the_checkpoint_names(studio: Studio) -> None:
    lines = "picture = image\nif isinstance(self.vae, TinyVAE):\n    picture = self.image_processor.preprocess(image)"
    assert 'if model_index["vae"][1] == "TinyVAE":' in function_of(with_picture(studio, lines))


def test_a_check_within_a_unit_is_kept_and_one_outside_is_left_to_the_worker(studio: Studio) -> None:
    lines = (
        'if height > 4096:\n    raise ValueError("too high")\n'
        'picture = image\nif image is not None:\n    if height < 8:\n        raise ValueError("too low")\n'
        "    picture = self.image_processor.preprocess(image)"
    )
    text = function_of(with_picture(studio, lines))
    assert "too low" in text and "too high" not in text


def test_a_wrong_request_is_left_to_the_pipeline(studio: Studio) -> None:
    text = function_of(with_picture(studio, "picture = self.image_processor.preprocess(image)"))
    assert "except Exception:" in text and "return request" in text


def test_what_only_the_worker_knows_keeps_the_picture_there_with_file_and_line(studio: Studio) -> None:
    port = with_picture(studio, "picture = self.image_processor.preprocess(image, height=embeds.shape[0])")
    assert port.pre_process is None and "prepared_media" not in printed(port)
    reason = port.features["pre_process"].reason
    assert port.features["pre_process"].status == "unsupported"
    assert "pipelines/tiny.py:" in reason and "self.image_processor.preprocess stays in the worker" in reason


def test_noise_on_the_picture_keeps_it_in_the_worker(studio: Studio) -> None:
    port = with_picture(studio, "picture = self.image_processor.preprocess(image + torch.randn(image.shape))")
    assert port.pre_process is None and "noise" in port.features["pre_process"].reason


def test_a_function_that_draws_noise_keeps_the_picture_in_the_worker(studio: Studio) -> None:
    source = HEAD + "def noisy(picture):\n    return picture + torch.randn_like(picture)\n\n\n"
    port = with_picture(studio, "picture = self.image_processor.preprocess(noisy(image))", head=source)
    assert port.pre_process is None and "noise" in port.features["pre_process"].reason


def test_a_method_that_changes_its_argument_is_not_called_from_the_function(studio: Studio) -> None:
    method = "\n    def shorter(self, pictures):\n        pictures.pop()\n        return pictures\n\n"
    port = with_picture(studio, "picture = self.image_processor.preprocess(self.shorter(image))", method)
    assert port.pre_process is None and "self.shorter is a method" in port.features["pre_process"].reason
    assert "staticmethod" not in printed(port)


def test_a_list_of_the_request_is_not_added_to(studio: Studio) -> None:
    port = with_picture(studio, "image.append(mask_image)\npicture = self.image_processor.preprocess(image)")
    assert port.pre_process is None


def test_nothing_of_the_request_is_changed_in_place(studio: Studio) -> None:
    port = with_picture(studio, "first = image.pop()\npicture = self.image_processor.preprocess(first)")
    assert port.pre_process is None and "in place" in port.features["pre_process"].reason


def test_a_loop_with_device_work_stays_whole(studio: Studio) -> None:
    lines = (
        "picture = []\nfor each in image:\n    each = self.image_processor.preprocess(each)\n"
        "    picture.append(self.vae.encode(each))"
    )
    port = with_picture(studio, lines)
    assert port.pre_process is None


def test_a_loop_on_the_request_alone_is_prepared_whole(studio: Studio) -> None:
    lines = "picture = []\nfor each in image:\n    picture.append(self.image_processor.preprocess(each))"
    text = function_of(with_picture(studio, lines))
    assert "picture.append(image_processor.preprocess(each))" in text and 'prepared["picture"] = picture' in text


def test_a_part_that_stays_is_said_beside_one_that_is_prepared(studio: Studio) -> None:
    lines = (
        "picture = self.image_processor.preprocess(image)\n"
        "mask = self.image_processor.preprocess(mask_image, height=embeds.shape[0])"
    )
    port = with_picture(studio, lines, use="picture * mask")
    assert port.features["pre_process"].status == "generated"
    assert port.features["pre_process"].reason.count("stays in the worker") == 1


def test_without_media_nothing_is_printed(studio: Studio) -> None:
    port = studio.port()
    assert port.pre_process is None and "pre_process" not in port.features
    assert "classmethod" not in printed(port) and "prepared_media" not in printed(port)


def test_requests_with_other_pictures_share_a_loop(studio: Studio) -> None:
    text = class_of(with_picture(studio, "picture = self.image_processor.preprocess(image)"))
    arguments = text[text.index("_request_arguments") :]
    assert '"prepared_media"' in arguments[: arguments.index(")")]
