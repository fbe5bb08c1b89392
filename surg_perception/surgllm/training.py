# SPDX-License-Identifier: Apache-2.0
"""All of SurgLLM's training in order: reconstruct, align, warm up, tune, one adapter a task, router, model folder.

Each stage has a folder of its own below `<out>/training`, goes on where it was stopped, and is not done again when
it is finished. One encoder goes through all of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from surg_perception.data.clip_labels import ClipVideo, open_clip_videos, split_groups
from surg_perception.data.label_files import DatasetError
from surg_perception.gsvit.trainer import TrainingError, TrainSettings, fit
from surg_perception.models import ModelError, sha256_of
from surg_perception.surgllm.alignment import ALIGNMENT_SETTINGS, AlignmentConfig, align
from surg_perception.surgllm.base_models import find_base_model
from surg_perception.surgllm.config import CONFIGS, JOINT, SurgLLMConfig
from surg_perception.surgllm.encoder import VideoEncoder, load_stem_weights
from surg_perception.surgllm.feature_cache import cached_clip_frames, cached_features
from surg_perception.surgllm.grounding import GROUNDING, ground
from surg_perception.surgllm.language_model import adapters_that_fit, fast_dtype
from surg_perception.surgllm.model import SurgLLM, start_qformer
from surg_perception.surgllm.model_folder import (
    SurgLLMCard,
    find_surgllm,
    licence_of,
    load_weights,
    save_surgllm,
)
from surg_perception.surgllm.prompt import Prompter
from surg_perception.surgllm.questions import (
    TASKS,
    Sample,
    SampleError,
    make_captions,
    make_samples,
    read_samples,
    write_samples,
)
from surg_perception.surgllm.reconstruction import RECONSTRUCTION, ReconstructionOptions, reconstruct_pretrain
from surg_perception.surgllm.router import Router, RouterError
from surg_perception.surgllm.sentence_encoder import SentenceEncoder
from surg_perception.surgllm.tuning import (
    ADAPTING,
    TUNING,
    WARM_UP,
    Tokens,
    WarmUpTask,
    cached_tokens,
    lessons_of,
    tune,
)

INTENDED_USE = (
    "Research: questions about the last seconds of laparoscopic cholecystectomy video. Not a medical device; answers "
    "can be wrong and must not decide about a patient or move a robot."
)

_PLAIN_TEXT = AlignmentConfig(start="", layers=2, fusion_layers=1)


@dataclass(frozen=True)
class SurgLLMOptions:
    """What is trained, and for how long.

    Attributes:
        config: of `CONFIGS`, or one's own.
        held_out: videos (`ClipVideo.video`) that only measure.
        per_task: questions of each task for the joint tuning.
        tune_questions: at most so many of them go through the language model; 0 for all. The warm-up sees all.
        adapter_per_task: fresh questions of each task for its adapter.
        validation_per_task: of the held-out videos.
        tasks: with an adapter of their own.
        seed: of questions and weights.
        stills: also train on frames without neighbours in time (`open_clip_videos`).
        reconstruction, grounding, alignment, warm_up, tuning, adapting: settings of the stages.
        masking: what the first stage hides.
        text: of the second stage; None for what fits `config`.
    """

    config: SurgLLMConfig = CONFIGS["small"]
    held_out: tuple[str, ...] = ()
    per_task: int = 1500
    adapter_per_task: int = 500
    tune_questions: int = 0
    validation_per_task: int = 32
    tasks: tuple[str, ...] = TASKS
    seed: int = 0
    stills: bool = True
    reconstruction: TrainSettings = RECONSTRUCTION
    grounding: TrainSettings = GROUNDING
    alignment: TrainSettings = ALIGNMENT_SETTINGS
    warm_up: TrainSettings = WARM_UP
    tuning: TrainSettings = TUNING
    adapting: TrainSettings = ADAPTING
    masking: ReconstructionOptions = field(default_factory=ReconstructionOptions)
    text: AlignmentConfig | None = None


def train_surgllm(
    data: Sequence[str],
    out: Path,
    options: SurgLLMOptions = SurgLLMOptions(),
    *,
    cache: Path,
    name: str | None = None,
    licence: str | None = None,
    resume: bool = True,
    console: Console | None = None,
) -> SurgLLMCard:
    """Train a SurgLLM from data sets to a model folder.

    Args:
        data: as `open_clip_videos`, each.
        out: the model folder; trainings in `training/` below it.
        options: what and for how long.
        cache: for frames and features.
        name: of the model; the folder's unless told.
        licence: of the model; what the data demand unless told.
        resume: go on where an earlier call ended.
        console: for progress.

    Raises:
        DatasetError, SampleError: data that cannot be used.
        ValueError: tasks or other options that cannot be used.
        BaseModelMissing: files of a base model are not on this machine.
        TrainingError: as `fit`, or nothing to train on.
    """
    console = console or Console()
    config, seed = options.config, options.seed
    folder = out / "training"
    adapters_that_fit(options.tasks)
    if unknown := [task for task in options.tasks if task not in TASKS]:
        raise ValueError(f"task {unknown[0]!r} found, expected some of {', '.join(TASKS)}; add others afterwards")
    prompter, sentences = Prompter(config), SentenceEncoder()  # whose files may be missing: before all that takes long
    base_models = _base_models(config)
    videos = _clips(data, options.stills, labelled=True)
    training, held_out = split_groups(videos, options.held_out) if options.held_out else (videos, [])
    samples = make_samples(training, seed, options.per_task)
    measured = make_samples(held_out, seed, options.validation_per_task) if held_out else []
    more = make_samples(training, seed + 1, options.adapter_per_task)
    asked = [task for task in options.tasks if any(sample.task == task for sample in more)]
    if len(asked) < 2:
        raise TrainingError(
            f"questions of {', '.join(asked) or 'no task'} can be made from these labels, expected two tasks or more, "
            "between which the router chooses (docs/questions.md says which labels each task needs)"
        )
    threads = options.tuning.threads
    if threads:
        torch.set_num_threads(threads)
    # The backward pass of the CPU's fused attention takes several times as long as plain matrix products.
    torch.backends.cuda.enable_flash_sdp(torch.cuda.is_available())
    console.print(f"{sum(map(len, training))} s of {len({v.video for v in training})} videos to train on")

    console.rule("Surg-Pretrain A: instrument-centric masked reconstruction")
    torch.manual_seed(seed)
    encoder = VideoEncoder(config.encoder)
    load_stem_weights(encoder)
    with Progress(console=console) as progress:
        bar = progress.add_task("frames", total=None)
        frames = cached_clip_frames(
            videos, config.encoder.image_size, cache, lambda done, all: progress.update(bar, completed=done, total=all)
        )
    moving = [video for video in training if video.hold_s == 1]
    reconstructed, reconstruction_figures = reconstruct_pretrain(
        encoder,
        moving or training,
        [video for video in held_out if video.hold_s == 1],
        frames,
        folder / "a_reconstruction",
        options.masking,
        replace(options.reconstruction, seed=seed),
        resume=resume,
        console=console,
    )
    encoder = reconstructed.encoder

    console.rule("Surg-Pretrain B: grounding, then alignment with captions")
    with Progress(console=console) as progress:
        bar = progress.add_task("features", total=None)
        features = cached_features(
            encoder, videos, cache, lambda done, all: progress.update(bar, completed=done, total=all)
        )
    encoder = ground(
        encoder,
        training,
        features,
        config.segment_frames,
        replace(options.grounding, seed=seed),
        folder / "b_grounding",
        validation=held_out,
        resume=resume,
        console=console,
    )
    text = options.text or (AlignmentConfig(config.qformer.start) if config.qformer.start else _PLAIN_TEXT)
    encoder = align(
        encoder,
        make_captions(training, seed),
        features,
        replace(options.alignment, seed=seed),
        folder / "b_alignment",
        config=text,
        validation=make_captions(held_out, seed) if held_out else (),
        resume=resume,
        console=console,
    )
    with Progress(console=console) as progress:
        bar = progress.add_task("segments", total=None)
        tokens = cached_tokens(
            encoder,
            features,
            config.segment_frames,
            cache,
            [*samples, *measured, *more],
            lambda done, all: progress.update(bar, completed=done, total=all),
        )

    write_samples(folder / "questions.json", samples)
    torch.manual_seed(seed)
    model = SurgLLM(config, fast_dtype() if config.language_model != "tiny" else torch.float32)
    model.encoder.load_state_dict(encoder.state_dict())
    if config.qformer.start:
        start_qformer(model.qformer, config.qformer)
    model.language_model.add_adapter(JOINT)

    console.rule("TM-Tuning: warm-up of the Q-Former")
    lessons, unseen = (lessons_of(asked_of, videos, config.segment_frames) for asked_of in (samples, measured))
    warm_up = WarmUpTask(model, prompter, lessons, tokens, unseen)
    fit(warm_up, replace(options.warm_up, seed=seed), folder / "c_warm_up", resume=resume, console=console)

    console.rule("TM-Tuning: all tasks together")
    tune(
        model,
        prompter,
        samples[: options.tune_questions or None],
        tokens,
        JOINT,
        replace(options.tuning, seed=seed),
        folder / "d_joint",
        validation=measured,
        resume=resume,
        console=console,
    )
    for task in options.tasks:
        _adapt(model, prompter, task, more, measured, tokens, options, folder, resume, console)

    adapted = [name for name in model.language_model.adapters if name != JOINT]
    questions = {task: [s.question for s in (*samples, *more) if s.task == task] for task in adapted}
    router = Router.fit(questions, sentences)
    console.print(f"router: {router.held_out_accuracy:.1%} of kept-back questions go to the right task")
    card = SurgLLMCard(
        folder=out,
        name=name or out.resolve().name,
        version="0.1.0",
        config=config,
        tasks=tuple(adapted),
        base_models=base_models,
        metrics={
            "router_held_out_accuracy": round(router.held_out_accuracy, 4),
            "reconstruction": {k: round(v, 4) for k, v in reconstruction_figures.items()},
        },
        training={
            "data": _names(data),
            "videos": sorted({video.video for video in training}),
            "held_out": list(options.held_out),
            "seconds": sum(map(len, training)),
            "questions": {task: sum(s.task == task for s in samples) for task in TASKS},
            "tuned_on": len(samples[: options.tune_questions or None]),
            "seed": seed,
            "stages": {
                stage: {"epochs": s.epochs, "batch": s.batch, "learning_rate": s.learning_rate}
                for stage, s in (
                    ("reconstruction", options.reconstruction),
                    ("grounding", options.grounding),
                    ("alignment", options.alignment),
                    ("warm_up", options.warm_up),
                    ("tuning", options.tuning),
                    ("adapting", options.adapting),
                )
            },
        },
        licence=licence or licence_of(data),
        intended_use=INTENDED_USE,
    )
    weights = {a: model.language_model.adapter_weights(a) for a in model.language_model.adapters}
    return save_surgllm(model, weights, router, card)


def add_task(
    model: str | Path,
    task: str,
    questions: Path,
    data: Sequence[str],
    out: Path,
    settings: TrainSettings = ADAPTING,
    *,
    cache: Path,
    stills: bool = True,
    resume: bool = True,
    console: Console | None = None,
) -> SurgLLMCard:
    """Give a trained model one task more: an adapter from the joint one, and a router that knows its questions.

    Args:
        model: name or folder of the model.
        task: name of the new task, or of one whose adapter is trained anew.
        questions: file of `read_samples`, all its questions; their clips are those of `data`.
        data: as `open_clip_videos`.
        out: the new model's folder.
        settings: of the training.
        cache: for frames and features.
        stills, resume, console: as `train_surgllm`.

    Raises:
        ModelError: no such model, or one whose files are missing, damaged or do not fit.
        ValueError: a name that no task can have.
        SampleError, DatasetError: questions or data that cannot be used.
        BaseModelMissing: files of a base model are not on this machine.
        TrainingError: as `fit`.
    """
    console = console or Console()
    adapters_that_fit([task])
    card = find_surgllm(model)
    videos = _clips(data, stills, labelled=False)  # the questions are there already
    samples = [replace(sample, task=task) for sample in read_samples(questions, task=task, videos=videos)]
    if len({sample.question for sample in samples}) < 2:
        raise SampleError(f"{questions}: fewer than two different questions found, from which the router cannot learn")
    longest_s = card.config.segment_frames * card.config.max_segments
    for sample in samples:
        if sample.end_s - sample.start_s > longest_s:
            raise SampleError(
                f"{questions}: {sample.id} is about {sample.end_s - sample.start_s} s, {card.name} sees at most "
                f"{longest_s} s; give start_s and end_s"
            )
    surgllm = open_surgllm(card)
    try:
        router = Router.load(card.folder, SentenceEncoder())
    except RouterError as error:
        raise ModelError(str(error)) from error
    router = router.with_task(task, [sample.question for sample in samples])
    names = {sample.video for sample in samples}
    used = [video for video in videos if video.name in names]
    features = cached_features(surgllm.encoder, used, cache)
    tokens = cached_tokens(surgllm.encoder, features, card.config.segment_frames, cache, samples)
    if task in surgllm.language_model.adapters:
        weights = surgllm.language_model.adapter_weights(JOINT)
        surgllm.language_model.load_adapter_weights(task, weights)
    tune(
        surgllm,
        Prompter(card.config),
        samples,
        tokens,
        task,
        settings,
        out / "training" / f"e_{task}",
        resume=resume,
        console=console,
    )
    added = {"task": task, "questions": len(samples), "questions_sha256": sha256_of(questions), "data": _names(data)}
    card = replace(
        card,
        folder=out,
        name=out.resolve().name,
        metrics={**card.metrics, "router_held_out_accuracy": round(router.held_out_accuracy, 4)},
        training={**card.training, "added_tasks": [*card.training.get("added_tasks", []), added]},
        licence=card.licence if licence_of(data) == "Apache-2.0" else licence_of(data),
    )
    weights_of = {a: surgllm.language_model.adapter_weights(a) for a in surgllm.language_model.adapters}
    return save_surgllm(surgllm, weights_of, router, card)


def open_surgllm(card: SurgLLMCard) -> SurgLLM:
    """The model of a folder with its adapters in place, to train on.

    Raises:
        ModelError: a file is missing, damaged or does not fit.
        BaseModelMissing: files of a base model are not on this machine.
    """
    stored, adapters = load_weights(card)
    try:
        model = SurgLLM(card.config, fast_dtype() if card.config.language_model != "tiny" else torch.float32)
        model.load_stored_weights(stored)
        for name, weights in adapters.items():
            model.language_model.add_adapter(name)
            model.language_model.load_adapter_weights(name, weights)
    except ValueError as error:
        raise ModelError(f"{card.folder}: {error}") from error
    return model


def _clips(data: Sequence[str], stills: bool, labelled: bool) -> list[ClipVideo]:
    """Clips of all data sets, each with a name of its own."""
    videos = [video for path in data for video in open_clip_videos(path, stills=stills, labelled=labelled)]
    counts = Counter(video.name for video in videos)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DatasetError(f"{len(twice)} clips are in the data twice, first {twice[0]}; expected each once")
    return videos


def _names(data: Sequence[str]) -> list[str]:
    """What the card says of the data: no folder of this machine."""
    return [source if source.startswith("phantom:") else Path(source).resolve().name for source in data]


def _adapt(
    model: SurgLLM,
    prompter: Prompter,
    task: str,
    samples: Sequence[Sample],
    measured: Sequence[Sample],
    tokens: Tokens,
    options: SurgLLMOptions,
    folder: Path,
    resume: bool,
    console: Console,
) -> None:
    console.rule(f"Adapter: {task}")
    own = [sample for sample in samples if sample.task == task]
    if not own:
        console.print(f"no question of the task {task} can be made from these labels: it gets no adapter")
        return
    tune(
        model,
        prompter,
        own,
        tokens,
        task,
        replace(options.adapting, seed=options.seed),
        folder / f"e_{task}",
        validation=[sample for sample in measured if sample.task == task],
        resume=resume,
        console=console,
    )


def _base_models(config: SurgLLMConfig) -> dict[str, str]:
    """sha256 of the weights of the base models; of several files, that of their sha256 in the order of their names."""
    found = {}
    for name in (config.language_model, config.qformer.start):
        if name not in ("", "tiny"):
            folder = find_base_model(name)
            files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
            digests = [sha256_of(file) for file in files]
            joined = "".join(digests).encode()
            found[name] = digests[0] if len(digests) == 1 else hashlib.sha256(joined).hexdigest()
    return found
