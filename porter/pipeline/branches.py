"""The branches of a guider as code: one list of arguments for the engine's multi-branch call, combined by the guider."""

from __future__ import annotations

import libcst as cst

from porter.facts.pipeline.guider_loop import GuiderLoop
from porter.pipeline.refused import is_refused
from porter.source.marks import inherit
from porter.source.tree import expression, replace_nodes, self_attribute, statement, statements, with_body

RULE = "guider-branches"
_PREDICT = '''
def predict_noise(self, given, branch, **kwargs):
    """The prediction of one guidance branch."""
    # The guider counts the branches that it prepared; another rank may run those before this one.
    guider._count_prepared = branch
    guider.prepare_models(model)
    noise_pred = prediction
    guider.cleanup_models(model)
    return noise_pred
'''
_COMBINE = '''
def combine_multi_branch_cfg_noise(self, predictions, true_cfg_scale, cfg_normalize=False):
    """The predictions of all branches: the guider combines them."""
    return tuple(predictions)
'''
_AFTER = """
predictions = self.predict_noise_with_multi_branch_cfg(
    do_true_cfg=True, true_cfg_scale=1.0, branches_kwargs=branches_kwargs
)
for batch, noise_pred in zip(batches, predictions):
    batch.noise_pred = noise_pred
"""


def branch_code(found: GuiderLoop) -> tuple[list[cst.BaseStatement], list[cst.BaseStatement]]:
    """What stands for the loop, and the methods of the engine's mixin that it needs in another form."""
    appended = statement("branches_kwargs.append(entry)", entry=_entry(found))
    inner = [*found.inner, inherit(appended, found.loop, RULE)]
    target = cst.Tuple([cst.Element(cst.Name("branch")), cst.Element(found.batch)], lpar=[], rpar=[])
    loop = with_body(found.loop, inner).with_changes(
        target=target, iter=expression("enumerate(batches)", batches=found.batches), leading_lines=[]
    )
    first = statement("branches_kwargs = []").with_changes(leading_lines=found.loop.leading_lines)
    predicted, store = statements(_AFTER, batch=found.batch, batches=found.batches)
    predicted = predicted.with_changes(leading_lines=found.above)
    return [inherit(s, found.loop, RULE) for s in (first, loop, predicted, store)], _methods(found)


def _entry(found: GuiderLoop) -> cst.Dict:
    """Keyword arguments of one branch; a guider that is no component of the pipeline travels with them."""
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    own = {} if _is_component(found) else {"guider": found.guider}
    entries: list[cst.BaseDictElement] = [
        cst.DictElement(cst.SimpleString(f'"{name}"'), value, comma=comma)
        for name, value in {**own, "branch": cst.Name("branch")}.items()
    ]
    for arg in found.call.args:
        if arg.keyword is None:
            entries.append(cst.StarredDictElement(arg.value, comma=comma))
        elif not is_refused(arg.keyword.value, arg.value):
            entries.append(cst.DictElement(cst.SimpleString(f'"{arg.keyword.value}"'), arg.value, comma=comma))
    return cst.Dict(entries)


def _methods(found: GuiderLoop) -> list[cst.BaseStatement]:
    call = expression("model(**kwargs)", model=found.call.func)
    holes = {"prediction": replace_nodes(found.prediction, [(found.call, call)]), "model": found.call.func}
    text = _PREDICT
    if _is_component(found):
        text = text.replace(" given,", "")
        holes["guider"] = found.guider
    else:
        text = text.replace("given", "guider")
    return [statement(text.strip() + "\n", **holes), statement(_COMBINE.strip() + "\n")]


def _is_component(found: GuiderLoop) -> bool:
    return self_attribute(found.guider) is not None
