"""`mirage evaluate endpoint.base_url=URL endpoint.model=NAME`: measure a model behind a server as one in process."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from mirage.config.loader import load_section
from mirage.config.schema import DataConfig, EvalConfig
from mirage.endpoint.client import Endpoint
from mirage.errors import UserError
from mirage.evals.answers import Answer, AnswerStore
from mirage.evals.costs import say_answering, usage_kept
from mirage.evals.endpoint_generation import EndpointDecoding, ServerSpec, ask_for_answers, make_endpoint_prompts
from mirage.evals.evaluate import answering, counted, finished_results, score_all
from mirage.evals.generate import Prompt
from mirage.evals.request import Request, decide_request
from mirage.evals.results import RESULTS_FILE, Results, read_results
from mirage.evals.show_results import show_results
from mirage.tracking.console import Terminal, console_mode, make_console
from mirage.tracking.progress import Progress

# What the command takes besides the keys of the recipe's eval section.
_OWN_SETTINGS = ("out_dir", "baseline", "console")
# Where evaluations of servers lie: there is no run and no checkpoint beside which they could.
DEFAULT_FOLDER = Path("runs") / "endpoints"


def evaluate_endpoint(
    request: Request, *, out_dir: Path, baseline: Path | None = None, console: Terminal | None = None
) -> Results:
    """Ask the server for the missing answers of `request` (made without a checkpoint), score all, write the results.

    The same call again continues a killed evaluation, asks anew for what faults of the line took, and returns at once
    when nothing is missing. Raises `UserError` where no further call can succeed.
    """
    done = finished_results(out_dir, request.key)
    if done is not None and request.is_settled_by(done):
        return done
    server, decoding = request.config.endpoint, request.decoding
    assert server is not None and isinstance(decoding, EndpointDecoding)
    prompts = {
        name: make_endpoint_prompts(samples, fingerprint=request.fingerprint, decoding=decoding)
        for name, samples in request.samples.items()
    }
    endpoint = Endpoint(server.endpoint_config(max_tokens=decoding.max_new_tokens))
    store = AnswerStore(out_dir, rank=0)
    together = [prompt for task_prompts in prompts.values() for prompt in task_prompts]
    say_answering(console, endpoint, together, store.read(), limit=decoding.max_new_tokens)
    work = answering(console or make_console("quiet"), len({prompt.key for prompt in together}))
    with usage_kept(console, endpoint, out_dir, role="model"), work:
        answers = asyncio.run(_ask(endpoint, prompts, decoding=decoding, store=store, work=work))
    return score_all(
        request,
        prompts,
        out_dir=out_dir,
        preprocessing=ServerSpec(model=server.model),
        baseline=baseline,
        checkpoint=server.model,
        step=None,
        answers=answers,
        console=console,
        works=[work],
    )


async def _ask(
    endpoint: Endpoint,
    prompts: dict[str, list[Prompt]],
    *,
    decoding: EndpointDecoding,
    store: AnswerStore,
    work: Progress,
) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    async with endpoint:
        for name, task_prompts in prompts.items():
            answers |= await ask_for_answers(
                endpoint, task_prompts, decoding=decoding, store=store, on_answers=counted(work, name)
            )
    return answers


def run(settings: Sequence[str]) -> int:
    """`mirage evaluate endpoint.base_url=URL endpoint.model=NAME key=value ...`: print the table, exit code.

    Settings are the recipe's `eval` keys, and `out_dir`, `baseline`, `console`. Raises `UserError`.
    """
    own = {key: text for key, _, text in (item.partition("=") for item in settings) if key in _OWN_SETTINGS}
    config = load_section("eval", [item for item in settings if item.partition("=")[0] not in _OWN_SETTINGS])
    assert isinstance(config, EvalConfig)
    console = make_console(console_mode(own.get("console")))
    if config.endpoint is None:
        raise UserError("give a PATH, or endpoint.base_url and endpoint.model to measure a model behind a server")
    baseline = Path(own["baseline"]) if "baseline" in own else None
    data_dir = (config.data_dir or Path(DataConfig().dir)).expanduser().absolute()
    # Only a guard model in this process runs here.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    request = decide_request(None, config=config, data_dir=data_dir, device=device, baseline=baseline)
    out_dir = Path(own["out_dir"]) if "out_dir" in own else _default_out_dir(config.endpoint.model, request.key)
    results = evaluate_endpoint(request, out_dir=out_dir, baseline=baseline, console=console)
    show_results(console, results, file=out_dir / RESULTS_FILE, before=read_results(baseline) if baseline else None)
    return 0


def _default_out_dir(model: str, key: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model"
    return DEFAULT_FOLDER / name[-80:] / key[:12]
