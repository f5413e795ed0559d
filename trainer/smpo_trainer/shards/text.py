"""The stored text of a data set: in which files prompts are, and their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from smpo_common.errors import UserError
from smpo_schemas.shards.text import StoredText
from smpo_schemas.shards.text_rows import TextRow


class TextOfShards:
    """The embeddings of every prompt of several directories, all of which store them."""

    def __init__(self, texts: Sequence[StoredText], first_file: int) -> None:
        """Join the directories.

        Args:
            texts: the stored text of each directory.
            first_file: number of the first text file among the files of the set.
        """
        self._texts = texts
        self._firsts = first_file + np.cumsum([0, *(text.num_files for text in texts[:-1])])

    def files_of(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the number, among the files of the set, of the file that holds each prompt: int32 [N].

        Raises:
            UserError: no directory has a prompt.
        """
        text_N, place_TN = self._find(prompts)
        files_N = np.empty(len(prompts), dtype=np.int32)
        for number, text in enumerate(self._texts):
            chosen_N = text_N == number
            files_N[chosen_N] = self._firsts[number] + text.files_of(place_TN[number, chosen_N])
        return files_N

    def read(self, prompts: Sequence[str], wait_for: Callable[[Iterable[int]], None]) -> list[TextRow]:
        """Read the embeddings of N prompts, one row per prompt, on the CPU.

        Args:
            prompts: N texts.
            wait_for: waits until files of these numbers are fetched and verified.

        Raises:
            UserError: no directory has a prompt, or a file is missing or damaged.
        """
        wait_for(set(self.files_of(prompts).tolist()))
        text_N, _ = self._find(prompts)
        rows: list[TextRow] = [{} for _ in prompts]
        for number in set(text_N.tolist()):
            positions = np.flatnonzero(text_N == number).tolist()
            encoded = self._texts[number]([prompts[position] for position in positions])
            for row, position in zip(encoded, positions, strict=True):
                rows[position] = row
        return rows

    def _find(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the first directory that holds each prompt, int64 [N], and its place in every one, int64 [T, N]."""
        place_TN = np.stack([text.find(prompts) for text in self._texts])
        text_N = (place_TN >= 0).argmax(axis=0)
        for number in np.flatnonzero((place_TN < 0).all(axis=0)).tolist():
            raise UserError(
                f"{self._texts[0].folder} lacks the prompt {prompts[number][:80]!r}: text and index of the shards "
                "differ; copy both again from where they were written, or invert again with --overwrite"
            )
        return text_N, place_TN
