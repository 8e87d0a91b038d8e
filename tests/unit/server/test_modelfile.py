"""What Ollama is told beside the GGUF file."""

import json

import pytest

from tunesmith_server.quantizers.modelfile import modelfile_of


@pytest.fixture
def folder(tmp_path):
    def write(**files):
        for name, content in files.items():
            path = tmp_path / name.replace("__", ".")
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return write


def test_it_names_the_file_the_context_the_end_tokens_and_the_license(folder):
    tokens = [{"id": 1, "content": "<|im_end|>"}, {"id": 2, "content": "</s>"}, {"id": 3, "content": 'a"b'}]
    source = folder(
        config__json={"max_position_embeddings": 2048, "eos_token_id": 2},
        generation_config__json={"eos_token_id": [1, 3, 9]},
        tokenizer__json={"added_tokens": tokens},
        README__md="---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\nlicense: other\n",
    )
    assert modelfile_of(source, "model.gguf").splitlines() == [
        "FROM ./model.gguf",
        "PARAMETER num_ctx 2048",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "</s>"',
        'LICENSE """apache-2.0"""',
    ]


def test_what_is_not_known_is_left_out_and_a_long_context_is_cut(folder):
    source = folder(config__json={"text_config": {"max_position_embeddings": 131072}}, README__md="# A model\n")
    assert modelfile_of(source, "model.gguf") == "FROM ./model.gguf\nPARAMETER num_ctx 8192\n"
    assert 'LICENSE """All rights."""' in modelfile_of(folder(LICENSE="All rights.\n"), "model.gguf")
