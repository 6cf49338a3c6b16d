"""Every option of `SFTConfig` is followed or refused; scores, metrics and checkpoints are those of the model."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig

from transformers_unicode2.training.checkpointing import ResumedProgress
from transformers_unicode2.training.parameters import freeze_all_but
from transformers_unicode2.training.prompt_images import swap_images, thin_images
from transformers_unicode2.training.stage import find_last_checkpoint
from transformers_unicode2.training.trainer import UniCode2SFTTrainer


@pytest.fixture
def rows():
    """Examples of several lengths, over texts and codes, with the start of each left out of the loss."""
    rng = np.random.default_rng(0)
    examples = [rng.integers(20, 768 + 96, size=length).tolist() for length in (9, 14, 20, 31)]
    return Dataset.from_list([{"input_ids": ids, "labels": [-100] * 4 + ids[4:]} for ids in examples])


@pytest.fixture
def make(model, processor, rows, tmp_path):
    """Makes trainers of the small model."""

    def make_trainer(train_dataset=rows, **options):
        others = (
            "eval_dataset",
            "compute_metrics",
            "preprocess_logits_for_metrics",
            "compute_loss_func",
            "formatting_func",
        )
        others = {name: options.pop(name) for name in others if name in options}
        settings = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        settings |= {"max_steps": 1, "logging_steps": 1, "learning_rate": 1e-12, "max_length": None}
        settings |= {"per_device_train_batch_size": 4, "gradient_checkpointing": False}
        arguments = SFTConfig(str(tmp_path / "out"), **{**settings, **options})
        tokenizer = processor.tokenizer
        return UniCode2SFTTrainer(model, arguments, train_dataset=train_dataset, processing_class=tokenizer, **others)

    return make_trainer


def score_row(model, ids: list[int], labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods of the targets of a row within their own head, and whether each is the best of it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    chances, hits = [], []
    for place, label in enumerate(labels):
        if label != -100:
            head = logits[place - 1, :768] if label < 768 else logits[place - 1, 768:]
            chances.append(head.log_softmax(-1)[label - 768 * (label >= 768)].item())
            hits.append(head.argmax().item() == label - 768 * (label >= 768))
    return np.array(chances), np.array(hits)


def compute_loss(model, rows: Dataset) -> float:
    """The loss of rows, each by itself, without a trainer."""
    model.eval()
    chances = [score_row(model, row["input_ids"], row["labels"])[0] for row in rows]
    model.train()
    return -np.concatenate(chances).mean()


def first_loss(trainer) -> float:
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1; it is not followed"),
        ({"loss_type": "dft"}, "`loss_type` is dft; it is not followed"),
        ({"neftune_noise_alpha": 5.0}, "the noise would reach text embeddings, but not those of images"),
        ({"use_liger_kernel": True}, "there are no Liger kernels"),
        ({"liger_kernel_config": {"rope": True}}, "there are no Liger kernels"),
        ({"compute_loss_func": len}, "`compute_loss_func` .* the loss is the model's own"),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, "are for a model by name"),
        ({"completion_only_loss": True}, "tokenized already, so `completion_only_loss` has no effect"),
        ({"completion_only_loss": False}, "tokenized already, so `completion_only_loss` has no effect"),
        ({"assistant_only_loss": True}, "tokenized already, so `assistant_only_loss` has no effect"),
        ({"dataset_text_field": "prompt"}, "tokenized already, so `dataset_text_field` has no effect"),
        ({"chat_template_path": "x.jinja"}, "tokenized already, so `chat_template_path` has no effect"),
        ({"eos_token": "<|endoftext|>"}, "tokenized already, so `eos_token` has no effect"),
        ({"formatting_func": str}, "tokenized already, so `formatting_func` has no effect"),
        (
            {"packing": True, "max_length": 64, "dataset_kwargs": {"skip_prepare_dataset": True}},
            "`packing` has no effect",
        ),
        (
            {"shuffle_dataset": True, "dataset_kwargs": {"skip_prepare_dataset": True}},
            "`shuffle_dataset` has no effect",
        ),
        (
            {"max_length": 16, "dataset_kwargs": {"skip_prepare_dataset": True}},
            "2 of 4 train examples are longer than `max_length` 16, the longest has 31 ids",
        ),
        ({"eval_dataset": [{"input_ids": [1]}]}, "The eval data are a list; give a `Dataset`"),
        ({"eval_dataset": {"a": iter([])}}, "The eval a data are a list_iterator; give a `Dataset`"),
        ({"router_aux_loss_coef": 0.1}, "not a Mixture-of-Experts model"),
    ],
)
def test_what_would_be_ignored_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.9}, {"neftune_noise_alpha": 5.0}])
def test_what_would_be_ignored_is_refused_in_arguments_of_any_trainer(model, processor, rows, tmp_path, options):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options)
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` is .* it is not followed"):
        UniCode2SFTTrainer(model, arguments, train_dataset=rows, processing_class=processor.tokenizer)
    with pytest.raises(ValueError, match="`compute_loss_func` is .* it is not followed"):
        UniCode2SFTTrainer(model, None, train_dataset=rows, processing_class=processor.tokenizer, compute_loss_func=len)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="activations can be moved off the accelerator")
def test_activations_are_not_moved_where_there_is_no_accelerator(make):
    with pytest.raises(ValueError, match="`activation_offloading` is true; it moves activations off an accelerator"):
        make(activation_offloading=True)


@pytest.mark.parametrize(
    "options",
    [
        {"padding_free": True},
        {"packing": True, "max_length": 80},
        {"pad_to_multiple_of": 64},
        {"gradient_checkpointing": True},
        {"shuffle_dataset": True},
        {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": 31},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
)
def test_how_examples_are_batched_does_not_change_the_loss(make, model, rows, options):
    assert first_loss(make(**options)) == pytest.approx(compute_loss(model, rows), rel=1e-5)


def test_texts_are_cut_at_max_length_and_images_are_not(make, model, rows):
    texts = rows.map(lambda row: {name: [id_ % 768 if id_ > 0 else id_ for id_ in row[name]] for name in row})
    short, whole = texts.map(lambda row: {name: row[name][:16] for name in row}), compute_loss(model, texts)
    cut = first_loss(make(texts, max_length=16))
    assert cut == pytest.approx(compute_loss(model, short), rel=1e-5) and abs(cut - whole) > 1e-4
    message = "2 of 4 train examples are longer than `max_length` 16, the longest has 31 ids; none is cut, since images"
    with pytest.raises(ValueError, match=message):
        make(max_length=16)
    with pytest.raises(ValueError, match="`max_length` is 16, at which a stream would be cut, images too"):
        make(rows.to_iterable_dataset(), max_length=16)
    with pytest.raises(ValueError, match="`packing_strategy` is wrapped, which cuts images; take bfd"):
        make(max_length=64, packing=True, packing_strategy="wrapped")
    with pytest.raises(ValueError, match="2 of 4 eval .* are longer than `max_length` 16"):
        make(texts, max_length=16).evaluate(rows)


def accuracy(prediction) -> dict[str, float]:
    scores, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    ids = scores if scores.ndim == 2 else scores.argmax(-1)
    return {"accuracy": float((ids == labels)[labels != -100].mean())}


def test_predictions_are_the_scores_of_the_model_and_metrics_come_of_them(make, model, rows):
    model.eval()
    trainer = make(eval_dataset=rows, compute_metrics=accuracy, per_device_eval_batch_size=2)
    predicted = trainer.predict(rows)
    hits = []
    for row, scores in zip(rows, predicted.predictions):
        with torch.no_grad():
            wanted = model(torch.tensor([row["input_ids"]])).logits[0]
        length = len(wanted)
        torch.testing.assert_close(torch.from_numpy(scores[:length]), wanted, rtol=1e-4, atol=1e-4)
        hits += (wanted.argmax(-1)[3 : length - 1] == torch.tensor(row["labels"][4:])).tolist()
    assert predicted.label_ids.shape == predicted.predictions.shape[:2] and predicted.predictions.shape[2] == 768 + 96
    assert predicted.metrics["test_accuracy"] == pytest.approx(np.mean(hits))
    few = make(
        eval_dataset=rows, compute_metrics=accuracy, preprocess_logits_for_metrics=lambda scores, _: scores.argmax(-1)
    )
    for metrics in (trainer.evaluate(), few.evaluate(), trainer.evaluate(rows)):
        assert metrics["eval_accuracy"] == pytest.approx(np.mean(hits)) and metrics["eval_visual_loss"] > 0


def test_evaluation_takes_what_training_takes_or_says_so(make, rows):
    trainer = make(eval_dataset={"seen": rows, "some": rows.select([0])})
    assert {"eval_seen_loss", "eval_some_loss"} <= trainer.evaluate().keys()
    stream = IterableDataset.from_generator(lambda: iter(list(rows)))
    assert trainer.evaluate(stream)["eval_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"])
    assert trainer.predict(stream).predictions.shape == trainer.predict(rows).predictions.shape
    assert trainer.predict(Dataset.from_dict({"text": ["a red circle"]})).predictions.shape[2] == 768 + 96
    for ask in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match="data are a generator; give a `Dataset` or an `IterableDataset`"):
            ask(row for row in rows)


def test_the_best_checkpoint_is_kept_and_loaded_in_the_end(make, rows):
    """Beside the newest one, with a limit of one; its path, which is noted, is that of the folder in the end."""
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    options |= {
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "learning_rate": 0.5,
        "metric_for_best_model": "loss",
    }
    trainer = make(eval_dataset=rows, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert best == f"{trainer.args.output_dir}/checkpoint-{min(losses, key=losses.get)}"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-5)
    newest = find_last_checkpoint(trainer.args.output_dir)
    state = json.loads(open(f"{newest}/trainer_state.json").read())
    assert newest.endswith("checkpoint-4") and state["best_model_checkpoint"] == best


def test_resuming_takes_the_newest_whole_checkpoint(make, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    with pytest.raises(ValueError, match="has no whole checkpoint to resume from"):
        make(**options).train(resume_from_checkpoint=True)
    make(**options).train()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    (tmp_path / "out/checkpoint-3/optimizer.pt").unlink()
    assert find_last_checkpoint(tmp_path / "out").endswith("checkpoint-2")
    shutil.rmtree(tmp_path / "out/checkpoint-2")
    trainer = make(**options)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
    assert find_last_checkpoint(tmp_path / "nowhere") is None


@pytest.fixture
def questions(config):
    """Examples with images of 16 codes in the question and a text in the answer, and one that draws."""
    rng = np.random.default_rng(0)
    examples = []
    for number in range(6):
        codes = (768 + rng.integers(0, 96, 16)).tolist()
        prompt = [20, config.boi_token_id, *codes, config.eoi_token_id]
        answer = rng.integers(20, 768, 2 + number).tolist()
        examples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    drawn = [config.boi_token_id, *codes, config.eoi_token_id]
    examples.append({"input_ids": [20, *drawn], "labels": [-100, *drawn]})
    return Dataset.from_list(examples)


def test_evaluation_gives_losses_accuracies_and_the_image_gap_of_its_rows(make, model, questions, capsys):
    model.eval()
    metrics = make(eval_dataset=questions, per_device_eval_batch_size=3).evaluate()
    _, swapped = swap_images(questions, 768)
    own = [score_row(model, row["input_ids"], row["labels"]) for row in questions]
    other = [score_row(model, row["input_ids"], row["labels"]) for row in swapped]
    gaps = [a[0].mean() - b[0].mean() for a, b in zip(own, other)]
    assert len(gaps) == 6 and metrics["eval_image_gap_rows"] == 6
    assert metrics["eval_image_gap"] == pytest.approx(np.mean(gaps), abs=1e-4)
    assert metrics["eval_image_gap_se"] == pytest.approx(np.std(gaps, ddof=1) / 6**0.5, rel=1e-3)
    # the row that draws has a text at both ends of its image
    texts, hits = (np.concatenate([row[kind] for row in own[:6]] + [own[6][kind][[0, -1]]]) for kind in (0, 1))
    assert metrics["eval_text_loss"] == pytest.approx(-texts.mean(), rel=1e-4)
    assert metrics["eval_text_accuracy"] == pytest.approx(hits.mean())
    assert metrics["eval_visual_loss"] == pytest.approx(-own[6][0][1:-1].mean(), rel=1e-4)
    assert metrics["eval_visual_accuracy"] == pytest.approx(own[6][1][1:-1].mean())
    assert "6 rows: nothing shows that the images are read." in capsys.readouterr().out


def test_each_evaluation_data_set_has_metrics_of_its_own(make, questions, rows):
    metrics = make(eval_dataset={"read": questions, "other": rows}).evaluate()
    assert {"eval_read_image_gap", "eval_read_text_loss", "eval_other_visual_accuracy"} <= metrics.keys()
    assert "eval_other_image_gap" not in metrics
    assert metrics["eval_read_text_loss"] != metrics["eval_other_text_loss"]


def test_a_model_that_reads_its_images_has_a_gap(make, model, questions, capsys):
    options = {"max_steps": 20, "learning_rate": 3e-2, "logging_steps": 20, "per_device_train_batch_size": 6}
    trainer = make(questions.select(range(6)), eval_dataset=questions, **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_image_gap"] > before["eval_image_gap"] + 0.2
    assert after["eval_image_gap"] > 2 * after["eval_image_gap_se"]
    assert "the images are read." in capsys.readouterr().out


def test_a_step_reads_a_part_of_the_codes_and_evaluation_all(make, model, questions):
    read = questions.select(range(6))
    trainer = make(read, eval_dataset=read, per_device_train_batch_size=6)
    trainer.codes_per_image = 4
    batch = trainer.data_collator([dict(row) for row in read])
    thinned = thin_images(batch, 768, 4, seed=0)
    assert thinned["input_ids"].shape[1] == batch["input_ids"].shape[1] - 12
    model.eval()
    with torch.no_grad():
        expected = model(**thinned).loss.item()
        whole = model(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-4)
    assert first_loss(trainer) == pytest.approx(expected, rel=1e-4)


def test_learning_rates_of_parts_are_followed_and_logged(make, model, questions):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    freeze_all_but(model, ["projector", "visual_embeddings", "language_model.layers"])
    trainer = make(questions.select(range(6)), learning_rate=1e-30, lr_scheduler_type="linear", max_steps=2)
    trainer.learning_rates = {"projector": 1e-2}
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if (value - before[name]).abs().max() > 1e-9}
    assert changed and all("projector" in name for name in changed)
    # Those of the two steps, not of the next ones
    logged = [(entry["learning_rate_projector"], entry["learning_rate"]) for entry in trainer.state.log_history[:2]]
    assert logged == [(1e-2, 1e-30), (5e-3, 5e-31)]
    trainer = make(questions)
    trainer.learning_rates = {"visual_head": 1e-2}
    with pytest.raises(ValueError, match="names `visual_head`, in which no parameter learns"):
        trainer.train()


def test_the_bar_of_a_resumed_run_counts_its_own_steps(make, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 2, "disable_tqdm": False}
    make(**options, max_steps=2).train()
    trainer = make(**options, max_steps=4)
    bars = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            bar = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ResumedProgress)).training_bar
            bars.append((bar.n, bar.initial, bar.format_dict["total"]))

    trainer.add_callback(Watch)
    trainer.train(resume_from_checkpoint=True)
    # the bar is moved after this callback or before it, by one step
    assert len(bars) == 2 and bars[-1][0] in (3, 4) and bars[0][1:] == (2, 4)


@pytest.mark.parametrize("options", [{"train_sampling_strategy": "group_by_length"}, {"dataloader_drop_last": True}])
def test_how_training_takes_rows_does_not_change_evaluation(make, questions, options):
    """Rows of several lengths, of which the last batch has one."""
    fixed = {"eval_dataset": questions, "per_device_eval_batch_size": 3}
    expected, got = make(**fixed).evaluate(), make(**fixed, **options).evaluate()
    names = ("eval_loss", "eval_text_loss", "eval_visual_accuracy", "eval_image_gap", "eval_image_gap_rows")
    assert [got[name] for name in names] == pytest.approx([expected[name] for name in names], abs=1e-6)
    assert make(**fixed, **options).predict(questions).predictions.shape[0] == 7
    few = make(**{**fixed, "per_device_eval_batch_size": 16}, **options).evaluate()
    assert few["eval_image_gap"] == pytest.approx(expected["eval_image_gap"], abs=1e-5)


def test_joined_rows_have_no_gap_and_the_trainer_says_how_to_have_one(make, questions, capsys):
    options = {"eval_dataset": questions, "packing": True, "max_length": 256}
    assert "eval_image_gap" not in make(**options).evaluate()
    assert "No image gap: `packing` and `padding_free` join rows" in capsys.readouterr().out
    apart = make(**options, eval_packing=False, per_device_eval_batch_size=1).evaluate()
    assert apart["eval_image_gap"] == pytest.approx(make(eval_dataset=questions).evaluate()["eval_image_gap"], abs=1e-5)


@pytest.mark.parametrize("options", [{"padding_free": True}, {"packing": True, "max_length": 80}])
def test_a_part_of_the_codes_of_joined_rows_is_refused(make, questions, options):
    trainer = make(questions, **options)
    trainer.codes_per_image = 4
    with pytest.raises(
        ValueError, match=f"`codes_per_image` is not for rows .* and `{next(iter(options))}` joins them"
    ):
        trainer.train()
