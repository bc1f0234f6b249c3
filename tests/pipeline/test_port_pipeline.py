"""Whole ports of a small pipeline: what is in them and what must not be."""

from __future__ import annotations

import ast

import pytest

from porter.model import PorterError
from tests.pipeline.conftest import CALL, HEAD, INIT, PIPELINE, Studio, printed


def test_a_port_is_python(studio: Studio) -> None:
    ast.parse(printed(studio.port()))


def test_guidance_becomes_two_branches_of_the_engine(studio: Studio) -> None:
    code = printed(studio.port())
    assert 'positive_kwargs = {"hidden_states": latents, "timestep": timestep, "text": embeds, }' in code
    assert 'negative_kwargs = positive_kwargs | {"text": negative_embeds, }' in code
    assert "do_classifier_free_guidance, guidance_scale, positive_kwargs, negative_kwargs, cfg_normalize=False" in code


def test_defaults_are_those_of_diffusers(studio: Studio) -> None:
    code = printed(studio.port())
    assert "num_inference_steps: int = 7" in code
    assert "guidance_scale: float = 3.0" in code
    assert "sampling.guidance_scale if sampling.guidance_scale_provided else None" in code


def test_nothing_of_diffusers_own_runtime_is_left(studio: Studio) -> None:
    code = printed(studio.port())
    for gone in ("callback_on_step_end is", "interrupt", "maybe_free_model_hooks", "_execution_device", "cache_context",
                 "locals()", "return_dict=True", "register_modules", "never_read", "lora_scale is not None"):  # fmt: skip
        assert gone not in code


def test_comments_of_the_source_stay(studio: Studio) -> None:
    code = printed(studio.port())
    for comment in ("# longest prompt decides", "# one number per image", "# compute the previous sample"):
        assert comment in code


def test_a_variable_that_only_some_paths_bind_is_bound_first(studio: Studio) -> None:
    code = printed(studio.port())
    assert code.index("negative_embeds = None") < code.index("negative_embeds = self.encode_prompt")


def test_a_component_nobody_uses_is_not_loaded(studio: Studio) -> None:
    assert '"safety"' not in printed(studio.port())


def test_every_parameter_has_a_place(studio: Studio) -> None:
    places = {p.name: p.place for p in studio.port().parameters}
    assert places["prompt"] == places["negative_prompt"] == "prompt"
    assert places["guidance_scale"] == places["latents"] == "sampling"
    assert places["num_images_per_prompt"] == "outputs"
    assert places["flavour"] == "extra"
    assert places["attention_kwargs"] == places["callback_on_step_end"] == "refused"


def test_post_processing_keeps_only_options_it_reads(studio: Studio) -> None:
    code = printed(studio.port())
    assert "processor = VaeImageProcessor()" in code
    assert "vae_scale_factor=self.vae_scale_factor" not in code


def test_the_unguided_norm_rescale_is_recognised(studio: Studio) -> None:
    rescale = """                    combined = negative_noise + self.guidance_scale * (noise - negative_noise)
                    a = torch.norm(noise, dim=-1, keepdim=True)
                    b = torch.norm(combined, dim=-1, keepdim=True)
                    noise = combined * (a / b)
"""
    plain = "                    noise = negative_noise + self.guidance_scale * (noise - negative_noise)\n"
    assert "cfg_normalize=True" in printed(studio.port(PIPELINE.replace(plain, rescale)))


def test_another_formula_overrides_the_combination(studio: Studio) -> None:
    source = PIPELINE.replace(
        "noise = negative_noise + self.guidance_scale * (noise - negative_noise)",
        "noise = noise + (self.guidance_scale - 1) * (noise - negative_noise)",
    )
    code = printed(studio.port(source))
    assert "def combine_cfg_noise(" in code
    assert "noise = noise + (true_cfg_scale - 1) * (noise - negative_noise)" in code


def test_batched_guidance_without_doubled_inputs_is_kept_as_it_is_and_said_so(studio: Studio) -> None:
    start = CALL.index("                if self.do_classifier_free_guidance:\n                    with")
    end = CALL.index("                # compute the previous")
    guide = """                if self.do_classifier_free_guidance:
                    a, b = noise.chunk(2)
                    noise = a + self.guidance_scale * (b - a)
"""
    batched = CALL[:start] + guide + CALL[end:]
    port = studio.port(HEAD + INIT + batched)
    assert port.features["cfg_parallel"].status == "unsupported"
    assert "batched guidance" in port.features["cfg_parallel"].reason
    assert "noise.chunk(2)" in printed(port)


def test_a_call_that_cannot_be_cut_runs_as_one_and_says_why(studio: Studio) -> None:
    source = PIPELINE.replace("for i, t in enumerate(timesteps):", "if timesteps:\n                i, t = 0, 1")
    port = studio.port(source)
    code = printed(port)
    assert "predict_guided_noise" not in code and "def prepare_encode" not in code
    assert "if timesteps:" in code[code.index("def diffuse") : code.index("def decode")]
    assert port.features["step_execution"].reason == port.features["cfg_parallel"].reason
    assert "no loop" in port.features["step_execution"].reason or "inside" in port.features["step_execution"].reason


def test_a_pipeline_that_never_denoises_is_diagnosed_not_guessed(studio: Studio) -> None:
    source = PIPELINE.replace("self.transformer(latents", "self.vae.net(latents")
    with pytest.raises(PorterError) as error:
        studio.port(source)
    assert error.value.diagnostics[0].code == "PORT501"


def test_two_scheduler_steps_make_one_piece(studio: Studio) -> None:
    step = "                latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]\n"
    port = studio.port(PIPELINE.replace(step, step + step))
    assert "more than one place" in port.features["step_execution"].reason


def test_requests_are_encoded_alone_and_share_the_loop(studio: Studio) -> None:
    code = printed(studio.port())
    assert "supports_request_batch: ClassVar[bool] = True" in code
    assert "self.diffuse(**joined)" in code
    assert '_rows: ClassVar[tuple[str, ...]] = ("latents", "embeds", "negative_embeds", )' in code


def test_prompts_padded_to_the_longest_share_no_encoding_without_a_mask(studio: Studio) -> None:
    port = studio.port(PIPELINE.replace('padding="max_length"', "padding=True"))
    assert port.features["request_batch"].status == "generated"
    assert "merge_arguments" not in printed(port)


def test_prompts_padded_to_the_longest_share_an_encoding_with_masks(studio: Studio) -> None:
    source = PIPELINE.replace('padding="max_length"', "padding=True")
    source = source.replace(
        "self.text_encoder(ids.to(device))", "self.text_encoder(ids.to(device), attention_mask=ids > 0)"
    )
    code = printed(studio.port(source.replace("text=embeds", "mask=height, text=embeds")))
    assert "merged = self.merge_arguments(requests)" in code
    assert "join_rows" not in code


def test_a_request_whose_state_stays_on_the_pipeline_runs_alone(studio: Studio) -> None:
    source = PIPELINE.replace('padding="max_length"', "padding=True").replace(
        "        height = height or 64\n", "        height = height or 64\n        self._prompt = prompt\n"
    )
    source = source.replace(
        "    def encode_prompt",
        "    def scaled(self, t):\n        return t * len(self._prompt)\n\n    def encode_prompt",
    )
    port = studio.port(source.replace("t.expand(latents.shape[0])", "self.scaled(t).expand(latents.shape[0])"))
    assert port.features["request_batch"].status == "unsupported"
    assert "self._prompt is kept" in port.features["request_batch"].reason
    assert "supports_request_batch: ClassVar[bool] = False" in printed(port)


@pytest.mark.parametrize(("taken", "status"), [("generator[0]", "unsupported"), ("generator", "generated")])
def test_a_loop_that_takes_the_first_generator_for_all_prompts_serves_one_request(
    studio: Studio, taken: str, status: str
) -> None:
    source = PIPELINE.replace(
        "    def encode_prompt",
        f"    def drawn(self, t, generator):\n        return t * torch.rand((), generator={taken})\n\n    def encode_prompt",
        1,
    ).replace("t.expand(latents.shape[0])", "self.drawn(t, generator).expand(latents.shape[0])")
    found = studio.port(source).features["request_batch"]
    assert found.status == status
    assert status == "generated" or "the first one's generator" in found.reason


def test_a_step_that_is_more_than_the_engines_gets_a_method_of_its_own(studio: Studio) -> None:
    source = PIPELINE.replace(
        "                if callback_on_step_end is not None:", "                latents = latents * self.scheduler.sigma\n"
        "                if callback_on_step_end is not None:",
    )  # fmt: skip
    code = printed(studio.port(source))
    assert "def step_latents(self, scheduler, noise, t, latents):" in code
    assert "latents = latents * scheduler.sigma" in code
    assert (
        "self.step_latents(state.scheduler, noise=noise_pred, t=state.current_timestep, latents=state.latents)" in code
    )


def test_state_that_a_helper_reads_stays_on_the_object(studio: Studio) -> None:
    helper = "    def strength(self):\n        return self._guidance_scale\n\n"
    stored = "        self._guidance_scale = guidance_scale\n"
    call = CALL.replace(stored, stored + "        height = height * self.strength()\n")
    code = printed(studio.port(HEAD + INIT + helper + call))
    assert "self._guidance_scale = guidance_scale" in code
    assert "def do_classifier_free_guidance(self):" in code


def test_a_loop_that_reads_state_of_one_call_gets_no_step_execution(studio: Studio) -> None:
    helper = "    def strength(self):\n        return self._guidance_scale\n\n"
    call = CALL.replace(
        "timestep = t.expand(latents.shape[0])", "timestep = t.expand(latents.shape[0]) * self.strength()"
    )
    port = studio.port(HEAD + INIT + helper + call)
    assert port.features["step_execution"].status == "unsupported"
    assert "def denoise_step" not in printed(port)


def test_the_same_source_gives_the_same_bytes(studio: Studio) -> None:
    assert printed(studio.port()) == printed(studio.port())


def test_state_that_the_loop_changes_is_not_the_argument_it_came_from(studio: Studio) -> None:
    changed = "                timestep = t.expand(latents.shape[0])\n"
    source = PIPELINE.replace(changed, changed + "                self._guidance_scale = 1 + guidance_scale * t\n")
    code = printed(studio.port(source))
    assert "call_guidance_scale = 1 + guidance_scale * t" in code
    assert "call_guidance_scale = guidance_scale" in code


def test_state_that_is_only_given_a_value_where_none_was_stays_one_name(studio: Studio) -> None:
    stored = "        self._guidance_scale = guidance_scale\n"
    source = PIPELINE.replace(
        stored, stored + "        if self.guidance_scale is None:\n            self._guidance_scale = 2.0\n"
    )
    assert "call_guidance_scale" not in printed(studio.port(source))


def test_constructor_arguments_are_the_ports_attributes(studio: Studio) -> None:
    source = PIPELINE.replace("self.never_read = 3", "self.factor = vae.config.factor\n        self.vae = vae")
    source = source.replace("height = height or 64", "height = height or self.factor")
    code = printed(studio.port(source))
    assert "self.factor = self.vae.config.factor" in code
    assert "self.vae = self.vae" not in code and "self.vae = vae" not in code


def test_state_made_from_a_parameter_nobody_can_set_is_that_parameter(studio: Studio) -> None:
    stored = "        self._guidance_scale = guidance_scale\n"
    more = "        self._attention_kwargs = attention_kwargs\n        if self._attention_kwargs is None:\n"
    more += "            self._attention_kwargs = {}\n"
    code = printed(studio.port(PIPELINE.replace(stored, stored + more)))
    assert "call_attention_kwargs" not in code


OVERLAY = """            image = self.image_processor.postprocess(image, output_type=output_type)
            if crop is not None:
                image = [self.image_processor.apply_overlay(mask, i, crop) for i in image]
"""


def overlaid(more: str = "") -> str:
    post = "            image = self.image_processor.postprocess(image, output_type=output_type)\n"
    source = PIPELINE.replace(post, OVERLAY + more)
    return source.replace('flavour: str = "plain"', 'flavour: str = "plain", crop=None, mask=None')


def test_a_paste_into_pictures_happens_before_post_processing(studio: Studio) -> None:
    code = printed(studio.port(overlaid()))
    paste = code.index("apply_overlay")
    assert code.rindex("postprocess(image, output_type=output_type)", 0, paste) < paste
    assert "self.image_processor.normalize(" in code[paste:]


def test_any_other_use_of_post_processed_output_is_diagnosed(studio: Studio) -> None:
    with pytest.raises(PorterError, match="used again"):
        studio.port(overlaid("            image = image[0]\n"))


def test_what_diffusers_itself_never_sets_is_a_finding_not_a_refusal(studio: Studio) -> None:
    source = PIPELINE.replace(
        "image = self.vae.decode(latents, return_dict=False)[0]", "image = self.decode_it(latents)"
    )
    port = studio.port(source)
    assert "self.decode_it(latents)" in printed(port)
    assert [d.code for d in port.diagnostics if "decode_it" in d.message] == ["PORT505"]


def test_two_results_leave_together(studio: Studio) -> None:
    source = PIPELINE.replace("return TinyOutput(images=image)", "return TinyOutput(frames=image, audio=embeds)")
    source = source.replace("self.image_processor.postprocess(image", "self.image_processor.postprocess_video(image")
    source = source.replace("return (image,)", "return (image, embeds)")
    code = printed(studio.port(source))
    assert "return image, embeds" in code
    assert "video, audio = output" in code
    assert "support_audio_output: ClassVar[bool] = True" in code


def test_a_middle_dot_in_a_comment_is_no_name(studio: Studio) -> None:
    comment = "                # one number per image"
    assert "# x - t\u00b7v" in printed(studio.port(PIPELINE.replace(comment, "                # x - t\u00b7v")))


def test_the_engines_key_for_the_main_picture_reaches_it_whatever_it_is_called(studio: Studio) -> None:
    source = PIPELINE.replace('flavour: str = "plain"', 'flavour: str = "plain", control_image=None')
    code = printed(studio.port(source.replace("height = height or 64", "height = height or control_image.height")))
    assert '("control_image", "image")' in code
    assert "SupportImageInput" in code and "dummy_run_num_frames" not in code


def test_a_call_that_needs_a_mask_as_well_is_not_warmed_up(studio: Studio) -> None:
    source = PIPELINE.replace('flavour: str = "plain"', 'flavour: str = "plain", image=None, mask_image=None')
    code = printed(studio.port(source.replace("height = height or 64", "height = image.height * mask_image.height")))
    assert "dummy_run_num_frames: " in code


def test_a_pipeline_without_pictures_says_so(studio: Studio) -> None:
    assert "SupportImageInput" not in printed(studio.port())


EXTRA = "                noise = noise + self.transformer(latents, timestep, text=embeds * i, return_dict=False)[0]\n"


def test_cache_dit_learns_how_many_branches_a_step_has(studio: Studio) -> None:
    code = printed(studio.port())
    override = code[code.index("def predict_noise_maybe_with_cfg") :]
    assert "keep_branches_apart(getattr(self, name), 2 if do_true_cfg else 1)" in override
    assert override.index("keep_branches_apart") < override.index("super().predict_noise_maybe_with_cfg(do_true_cfg")
    assert "refuse_cache_dit" not in code


def test_without_branches_one_call_a_step_is_free_and_a_second_is_refused(studio: Studio) -> None:
    start = CALL.index("                if self.do_classifier_free_guidance:\n                    with")
    end = CALL.index("                # compute the previous")
    batched = """                if self.do_classifier_free_guidance:
                    a, b = noise.chunk(2)
                    noise = a + self.guidance_scale * (b - a)
"""
    one = printed(studio.port(HEAD + INIT + CALL[:start] + batched + CALL[end:]))
    assert "keep_branches_apart" not in one and "refuse_cache_dit" not in one
    two = printed(studio.port(HEAD + INIT + CALL[:start] + batched + EXTRA + CALL[end:]))
    lines = [line.strip() for line in two.splitlines()]
    calls = [i for i, line in enumerate(lines) if "self.transformer(latents" in line]
    refused = [lines[i - 1] == "refuse_cache_dit(self.transformer)" for i in calls]
    assert refused == [False, True]


def test_branches_that_are_three_calls_in_the_source_are_refused_from_the_second_on(studio: Studio) -> None:
    combined = "                    noise = negative_noise + self.guidance_scale * (noise - negative_noise)\n"
    assert combined in PIPELINE
    code = printed(studio.port(PIPELINE.replace(combined, combined + "    " + EXTRA)))
    assert code.count("self.transformer(latents") == 3 and code.count("refuse_cache_dit(self.transformer)") == 2
    assert "keep_branches_apart" not in code
