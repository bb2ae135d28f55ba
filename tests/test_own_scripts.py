"""What users of Lightning and transformers add to a job or do with its result, beyond the examples."""

import threading

import architectures
import jobs
import pytest
import tiny_models
import torch
from lightning.pytorch.loggers import CSVLogger
from test_packed_loading import compress
from torch import Tensor, nn

from eacmoe_lightning import load, load_offloaded, offload_experts, pesf
from eacmoe_lightning.cli import main
from eacmoe_lightning.commands.trainer import calibration_trainer
from eacmoe_lightning.compressed.format import read_config
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.skipping import EES

SMALL = {"data__num_windows": 4, "data__num_heldout_windows": 2, "model__joint_epochs": 0}


def refused(capsys, *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(list(words))
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# --- callbacks and loggers


@pytest.mark.parametrize("callback", ["LearningRateMonitor", "RichProgressBar"])
def test_callbacks_of_lightning_leave_the_result_as_it_is(callback, fitted, tiny_model_dir, tmp_path):
    pytest.importorskip("rich")
    words = [f"--trainer.callbacks+={callback}"]
    more = {"trainer__enable_progress_bar": "true"} if callback == "RichProgressBar" else {}
    run = jobs.fit(tiny_model_dir("mixtral"), tmp_path / "run", *words, **SMALL, **more)
    reference = fitted("mixtral", **SMALL)
    assert jobs.contents(run / "compressed") == jobs.contents(reference / "compressed")


@pytest.mark.parametrize("callback", ["GradientAccumulationScheduler", "StochasticWeightAveraging"])
def test_callbacks_that_change_how_blocks_are_trained_are_refused(callback, tiny_model_dir, tmp_path, capsys):
    options = {
        "GradientAccumulationScheduler": ["--trainer.callbacks.scheduling", "{0: 2}"],
        "StochasticWeightAveraging": ["--trainer.callbacks.swa_lrs", "0.01"],
    }
    words = [f"--trainer.callbacks+={callback}", *options[callback]]
    message = refused(capsys, "fit", *jobs.options(tiny_model_dir("mixtral"), tmp_path / "run"), *words)
    assert f"the callback {callback} does not suit fit" in message and not (tmp_path / "run" / "run.json").exists()


def test_a_logger_may_write_into_the_run_directory(tiny_model_dir, tmp_path):
    words = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "run")]
    run = jobs.fit(tiny_model_dir("mixtral"), tmp_path / "run", *words, **SMALL)
    assert (run / "compressed").is_dir() and list(run.glob("lightning_logs/*/metrics.csv"))


def test_a_module_without_its_data_says_what_is_missing(tmp_path):
    trainer = calibration_trainer(tmp_path / "run", logger=CSVLogger(tmp_path), progress_bar=False)
    with pytest.raises(ValueError, match=r"trainer.fit\(module, datamodule=TextWindows"):
        trainer.fit(QESC("bundled"))


def test_a_checkpoint_is_not_taken_for_a_model(fitted):
    checkpoint = fitted("mixtral", **SMALL) / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="pass it to Trainer.fit as ckpt_path to go on, or open the finished model"):
        QESC.load_from_checkpoint(checkpoint)


# --- paths


@pytest.mark.parametrize(
    "words",
    [
        ["analyze", "--model", "bundled", "--num_windows", "1", "--output"],
        ["sensitivity", "--config", "tiny", "--output"],
    ],
)
def test_a_file_in_the_place_of_a_directory_is_named(words, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    message = refused(capsys, *words, str(tmp_path / "file"))
    assert f"{tmp_path / 'file'}" in message and "Pass another path" in message


@pytest.mark.parametrize(
    "words, option",
    [
        (["analyze", "--output", "unused", "--model"], "--model"),
        (["study", "--config", "study-tiny", "--output", "unused", "--model"], "--model"),
        (["validate", "--model.evaluate"], "--model.evaluate"),
        (["chat"], "MODEL"),
    ],
)
def test_a_directory_without_a_model_is_named_with_its_option(words, option, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, *words, str(tmp_path / "empty"))
    assert f"'{tmp_path / 'empty'}' ({option}): pass `bundled`" in message and "There is no config.json" in message


# --- the result


def test_a_resized_vocabulary_is_not_saved_into_a_directory_that_cannot_be_read(fitted, tmp_path):
    model = load(fitted("mixtral"))
    model.resize_token_embeddings(model.config.vocab_size + 8)
    with pytest.raises(ValueError, match=r"resized from 4096 to 4104 tokens.*packed=False"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@torch.no_grad()
def test_options_that_were_changed_are_saved(fitted, tokens, tmp_path):
    model = load(fitted("mixtral"))
    model.config.sliding_window, model.config.use_cache = 8, False
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert (again.config.sliding_window, again.config.use_cache) == (8, False)
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
    assert (again(tokens).logits - load(fitted("mixtral"))(tokens).logits).abs().max() > 1e-3  # the window counts
    again.save_pretrained(tmp_path / "twice")
    assert read_config(tmp_path / "twice") == read_config(tmp_path / "saved")


def test_packed_weights_without_memory_are_named(fitted, tokens):
    model = load(fitted("mixtral"))
    model.model.layers[1].self_attn.q_proj.to("meta")
    with torch.no_grad(), pytest.raises(RuntimeError, match="a packed weight is on meta.*load_offloaded"):
        model(tokens)


def test_packed_weights_pass_no_wrong_gradient(fitted, tokens):
    packed, decoded = (load(fitted("mixtral"), packed=packed) for packed in (True, False))
    with pytest.raises(RuntimeError, match=r"packed weights pass no gradient on.*packed=False"):
        packed(tokens, labels=tokens).loss.backward()
    with pytest.raises(ValueError, match="packed=False"):
        packed.dequantize()
    decoded(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(packed(tokens).logits, decoded(tokens).logits, rtol=1e-4, atol=1e-4)


def test_ratios_are_not_measured_while_experts_are_skipped(tokens):
    model = tiny_models.build("mixtral")
    with pesf(model, 0.7), pytest.raises(ValueError, match="the model skips experts by a rule"):
        EES.calibrate(model, tokens)
    assert EES.calibrate(model, tokens).ratios
    with pytest.raises(ValueError, match=r"windows has the shape.*\[windows, tokens\]"):
        EES.calibrate(model, tokens[0])


def test_a_prompt_in_pieces_is_warned_of_once(tokens, caplog):
    model = tiny_models.build("mixtral")
    with pesf(model, 0.7), torch.no_grad():
        for _ in range(2):
            cache = model(tokens[:, :8], use_cache=True).past_key_values
            model(tokens[:, 8:16], past_key_values=cache, use_cache=True)
    assert caplog.text.count("tokens follow 8 in the cache") == 1
    caplog.clear()
    with pesf(model, 0.7, decode=True), torch.no_grad():
        cache = model(tokens[:, :8], use_cache=True).past_key_values
        model(tokens[:, 8:16], past_key_values=cache, use_cache=True)
    assert "follow" not in caplog.text


class Threads:
    """Runs a function on each of several inputs at the same time, four times over."""

    def __init__(self, run, inputs: list) -> None:
        self.results, self.errors = [[] for _ in inputs], []
        start = threading.Barrier(len(inputs))

        def work(place: int) -> None:
            start.wait()
            try:
                for _ in range(4):
                    self.results[place].append(run(inputs[place]))
            except Exception as error:
                self.errors.append(error)

        threads = [threading.Thread(target=work, args=(place,)) for place in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def test_threads_that_skip_experts_keep_their_own_tokens(tokens):
    model = tiny_models.build("mixtral")
    short = torch.ones_like(tokens)
    short[:, : tokens.shape[1] // 2] = 0

    @torch.no_grad()
    def run(mask):
        return model(tokens, attention_mask=mask, use_cache=False).logits[:, -1]

    with pesf(model, 0.7):
        expected = [run(mask) for mask in (torch.ones_like(tokens), short)]
        threads = Threads(run, [torch.ones_like(tokens), short])
    assert not threads.errors
    for logits, results in zip(expected, threads.results, strict=True):
        for result in results:
            torch.testing.assert_close(result, logits, rtol=1e-5, atol=1e-5)


def threads_get_what_one_gets(model: nn.Module, tokens: Tensor) -> None:
    @torch.no_grad()
    def run(ids):
        return model(ids, use_cache=False).logits

    inputs = [tokens, tokens.flip(1)]
    expected = [run(ids) for ids in inputs]
    threads = Threads(run, inputs)
    assert not threads.errors
    for logits, results in zip(expected, threads.results, strict=True):
        for result in results:
            torch.testing.assert_close(result, logits, rtol=1e-4, atol=1e-4)


def test_threads_share_offloaded_experts_with_biases(tokens, tokenizer, tmp_path):
    """Whose biases, in the order of the slots, belong to one forward pass."""
    architectures.build("gpt_oss").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = load_offloaded(compress(tmp_path / "model", tmp_path / "compressed"), 0.4)
    threads_get_what_one_gets(model, tokens)
    model.offload.close()


def test_threads_share_an_offloaded_model(fitted, tokens):
    model = load_offloaded(fitted("mixtral"), 0.25)
    threads_get_what_one_gets(model, tokens)
    with pytest.raises(ValueError, match="offloaded already"):
        offload_experts(model, 0.5)
    model.offload.close()
    with pytest.raises(RuntimeError, match=r"after `offload.close\(\)`"), torch.no_grad():
        model(torch.randint(0, 4096, (1, 64)))
    assert isinstance(model, nn.Module)
