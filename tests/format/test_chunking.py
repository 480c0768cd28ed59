from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from castore.format.chunking import ALIGNMENT, Piece, pieces_by_chunk, plan_layout

CHUNK = 256
sizes = st.lists(
    st.integers(0, 300).flatmap(lambda n: st.sampled_from([1, 2, 4, 8]).map(lambda width: (n * width, width))),
    max_size=25,
)


@given(sizes)
def test_every_byte_is_in_one_chunk_and_no_chunk_is_over_the_limit(sizes: list[tuple[int, int]]) -> None:
    seen = [bytearray(size) for size, _ in sizes]
    for chunk in plan_layout(sizes, CHUNK)[1]:
        assert 0 < chunk.length <= CHUNK
        end = 0
        for piece in chunk.pieces:
            assert piece.at >= end
            end = piece.at + piece.stop - piece.start
            for i in range(piece.start, piece.stop):
                seen[piece.tensor][i] += 1
        assert end == chunk.length
    assert all(set(counts) <= {1} for counts in seen)


@given(sizes)
def test_covering_a_plan_gives_back_its_pieces(sizes: list[tuple[int, int]]) -> None:
    offsets, chunks = plan_layout(sizes, CHUNK)
    extents = [(offset, size) for offset, (size, _) in zip(offsets, sizes, strict=True)]
    covered = pieces_by_chunk(extents, [chunk.length for chunk in chunks])
    assert covered == [list(chunk.pieces) for chunk in chunks]


@given(sizes)
def test_tensors_that_share_a_chunk_are_aligned_and_of_one_width(sizes: list[tuple[int, int]]) -> None:
    for chunk in plan_layout(sizes, CHUNK)[1]:
        assert all(piece.at % ALIGNMENT == 0 for piece in chunk.pieces)
        assert {sizes[piece.tensor][1] for piece in chunk.pieces} == {chunk.itemsize}
        if len(chunk.pieces) > 1:
            assert all(2 * sizes[piece.tensor][0] < CHUNK for piece in chunk.pieces)


@given(sizes, sizes, st.integers(CHUNK // 2, 5 * CHUNK))
def test_a_large_tensor_is_cut_alike_wherever_it_stands(
    before: list[tuple[int, int]], after: list[tuple[int, int]], size: int
) -> None:
    def cuts(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        chunks = plan_layout([*before, (size, 1), *after], CHUNK)[1]
        return [
            (piece.start, piece.stop, chunk.length)
            for chunk in chunks
            for piece in chunk.pieces
            if piece.tensor == len(before)
        ]

    assert cuts(before, after) == cuts([], [])


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), max_size=12), st.lists(st.integers(1, 70)))
def test_cover_finds_every_byte_of_any_layout(gaps_and_sizes: list[tuple[int, int]], lengths: list[int]) -> None:
    extents, owner = [], {}
    end = 0
    for tensor, (gap, size) in enumerate(gaps_and_sizes):
        start = end + gap
        end = start + size
        extents.append((start, size))
        owner.update({start + i: (tensor, i) for i in range(size)})
    covered = {}
    start = 0
    for length, pieces in zip(lengths, pieces_by_chunk(extents, lengths), strict=True):
        for piece in pieces:
            assert piece.at >= 0
            assert piece.at + piece.stop - piece.start <= length
            covered.update(
                {start + piece.at + i: (piece.tensor, piece.start + i) for i in range(piece.stop - piece.start)}
            )
        start += length
    assert covered == {at: what for at, what in owner.items() if at < start}


def test_small_tensors_fill_a_chunk_before_another_is_begun() -> None:
    _, chunks = plan_layout([(100, 4), (10, 1), (100, 4), (60, 4)], CHUNK)
    assert [chunk.pieces for chunk in chunks] == [
        (Piece(0, 0, 100, 0), Piece(2, 0, 100, 128)),
        (Piece(1, 0, 10, 0),),
        (Piece(3, 0, 60, 0),),
    ]
