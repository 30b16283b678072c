"""The test hub serves the real client: what is pushed to it comes back unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from tests.shared import hub_server
from tests.shared.hub_server import HubServer
from tests.shared.versions import hub_clients_of_transformers

hub = hub_server.hub


@pytest.fixture(autouse=True)
def client_is_itself_again_after_the_test() -> Iterator[None]:
    def client() -> list[object]:
        endpoints = [api.endpoint for api in (HfApi(), huggingface_hub.hf_api.api, *hub_clients_of_transformers())]
        environment = {name: value for name, value in os.environ.items() if name.startswith(("HF_", "no_"))}
        return [vars(constants).copy(), environment, are_progress_bars_disabled(), endpoints]

    before = client()
    yield
    assert client() == before


# The adapter library asks the model for an attribute that the model library has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_pushed_lora_adapter_loads_again_by_its_repository_name(hub: HubServer, tmp_path: Path) -> None:
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    base = str(tmp_path / "base")
    BertForSequenceClassification(config).save_pretrained(base)

    def load_base() -> BertForSequenceClassification:
        return BertForSequenceClassification.from_pretrained(base)

    adapted = get_peft_model(load_base(), LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
    adapted.push_to_hub("me/my-adapter")

    with_adapter = load_base()
    with_adapter.load_adapter("me/my-adapter")
    loaded = {
        "peft": PeftModel.from_pretrained(load_base(), "me/my-adapter"),
        "auto_peft": AutoPeftModelForSequenceClassification.from_pretrained("me/my-adapter"),
        "transformers": with_adapter,
        "auto_transformers": AutoModelForSequenceClassification.from_pretrained("me/my-adapter"),
    }
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = adapted(ids).logits
        assert not torch.equal(expected, load_base().eval()(ids).logits)
        for name, model in loaded.items():
            assert torch.equal(model.eval()(ids).logits, expected), name
    assert PeftConfig.from_pretrained("me/my-adapter").base_model_name_or_path == base
    assert any(line.startswith("PUT /lfs/") for line in hub.requests)


def test_regular_and_lfs_files_round_trip_at_every_commit(hub: HubServer, tmp_path: Path) -> None:
    api = HfApi()
    api.create_repo("me/files")
    folder = tmp_path / "folder"
    (folder / "nested").mkdir(parents=True)
    (folder / "notes.txt").write_text("first")
    (folder / "nested" / "model.safetensors").write_bytes(b"\0weights")
    first = api.upload_folder(repo_id="me/files", folder_path=folder)
    (folder / "notes.txt").write_text("second")
    second = api.upload_folder(repo_id="me/files", folder_path=folder)

    paths = [".gitattributes", "nested/model.safetensors", "notes.txt"]
    assert sorted(api.list_repo_files("me/files")) == sorted(hub.files("me/files")) == paths
    tree = {entry.path: entry for entry in api.list_repo_tree("me/files", recursive=True)}
    assert tree["nested/model.safetensors"].lfs is not None
    assert tree["notes.txt"].lfs is None
    assert [entry.path for entry in api.list_repo_tree("me/files")] == [
        ".gitattributes",
        "nested",
        "notes.txt",
    ]

    assert api.model_info("me/files").sha == second.oid != first.oid
    assert Path(hf_hub_download("me/files", "nested/model.safetensors")).read_bytes() == b"\0weights"
    assert Path(hf_hub_download("me/files", "notes.txt")).read_text() == "second"
    assert Path(hf_hub_download("me/files", "notes.txt", revision=first.oid)).read_text() == "first"
    assert Path(hf_hub_download("me/files", "notes.txt")).is_relative_to(tmp_path)


def test_what_the_hub_does_not_hold_is_refused_with_the_errors_of_the_client(hub: HubServer) -> None:
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("me/nowhere", "config.json")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("nowhere")
    HfApi().create_repo("me/empty")
    HfApi().create_repo("me/empty", exist_ok=True)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/empty", "config.json")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("me/empty", revision="0" * 40)
    assert not HfApi().file_exists("me/empty", "config.json")
    assert HfApi().file_exists("me/empty", ".gitattributes")


def test_a_fresh_process_downloads_with_the_environment_of_the_hub(tmp_path: Path) -> None:
    with HubServer() as server:
        environment = server.env(tmp_path)
        script = """
            from huggingface_hub import HfApi, hf_hub_download
            HfApi().create_repo("me/files")
            HfApi().upload_file(path_or_fileobj=b"weights", path_in_repo="a.bin", repo_id="me/files")
            print(hf_hub_download("me/files", "a.bin"))
        """
        lines = "\n".join(line.strip() for line in script.splitlines())
        run = subprocess.run([sys.executable, "-c", lines], env=environment, capture_output=True, text=True, check=True)
        assert server.files("me/files")["a.bin"] == b"weights"
    downloaded = Path(run.stdout.strip())
    assert downloaded.is_relative_to(tmp_path)
    assert downloaded.read_bytes() == b"weights"
