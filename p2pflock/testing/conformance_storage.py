"""What every BlobStore and every Signer must do, whoever implements it.

Law: each `check_` function takes the means to make a fresh object and asserts one promise of ports.py; the
`check_blob_store` and `check_signer` runs are all of them.  Adapters, fakes and third-party implementations
call the same functions.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

from p2pflock.errors import InvalidMessageError, UnavailableError
from p2pflock.ports import BlobStore, Signer
from p2pflock.primitives import bls, dagcbor, peerid
from p2pflock.primitives.cid import CID, DAG_CBOR, RAW

BLOCKS = [
    b"",
    b"\0",
    bytes(range(256)) * 1024,  # one UnixFS chunk
    b"\x12\x04\n\x02\x08\x01",  # a raw block that looks like dag-pb must come back unchanged
]


def check_get_returns_what_was_put(store: BlobStore) -> None:
    for data in BLOCKS:
        cid = CID.of_raw(data)
        store.put(cid, data)
        store.put(cid, data)  # again is no error
        assert store.has(cid)
        assert store.get(cid) == data
    value = {"kind": "conformance", "link": CID.of_raw(BLOCKS[1]), "n": 7}
    block = dagcbor.encode(value)
    cid = CID.of_dag_cbor(block)
    store.put(cid, block)
    assert store.get(cid) == block


def check_wrong_hash_is_refused(store: BlobStore) -> None:
    cid = CID.of_raw(b"one thing")
    with pytest.raises(InvalidMessageError):
        store.put(cid, b"another thing")
    assert not store.has(cid)


def check_absent_block(store: BlobStore) -> None:
    for codec in (RAW, DAG_CBOR):
        cid = CID.of(codec, b"\xa0 nobody ever stored this")
        assert not store.has(cid)
        with pytest.raises(UnavailableError):
            store.get(cid)


def check_codec_is_part_of_the_id(store: BlobStore) -> None:
    block = dagcbor.encode({"same": "bytes"})
    store.put(CID.of_dag_cbor(block), block)
    store.put(CID.of_raw(block), block)
    assert store.get(CID.of_dag_cbor(block)) == block
    assert store.get(CID.of_raw(block)) == block


def check_pins(store: BlobStore) -> None:
    blocks = [b"pinned one", b"pinned two"]
    cids = sorted(CID.of_raw(data) for data in blocks)
    before = set(store.pins())
    for data in blocks:
        store.put(CID.of_raw(data), data)
        store.pin(CID.of_raw(data))
        store.pin(CID.of_raw(data))  # again is no error
    assert sorted(set(store.pins()) - before) == cids
    store.unpin(cids[0])
    store.unpin(cids[0])
    assert set(store.pins()) - before == {cids[1]}
    assert store.has(cids[0]), "unpinning does not delete"


def check_blob_store(make: Callable[[], BlobStore]) -> None:
    """All promises of BlobStore, each on a store of its own."""
    assert isinstance(make(), BlobStore)
    for check in (
        check_get_returns_what_was_put,
        check_wrong_hash_is_refused,
        check_absent_block,
        check_codec_is_part_of_the_id,
        check_pins,
    ):
        check(make())


def check_signer(signer: Signer) -> None:
    """All promises of Signer: every signature verifies under the key it is said to be of."""
    root = bytes(range(32))
    assert (len(signer.peer_id), len(signer.address), len(signer.bls_public_key)) == (38, 20, 48)
    assert len(signer.ed25519_seed()) == len(signer.evm_private_key()) == 32

    signature = signer.sign_bls(root)
    assert bls.verify(signer.bls_public_key, root, signature)
    assert not bls.verify(signer.bls_public_key, bytes(32), signature)

    proof = signer.prove_possession(root)
    assert bls.verify_possession(signer.bls_public_key, root, proof)
    assert not bls.verify(signer.bls_public_key, root, proof), "a proof must not pass for a vote"

    assert peerid.verify_ed25519(signer.peer_id, root, signer.sign_ed25519(root))
    assert not peerid.verify_ed25519(signer.peer_id, bytes(32), signer.sign_ed25519(root))

    assert peerid.recover_address(root, signer.sign_evm(root)) == signer.address  # refuses high s, other v

    shown = repr(signer) + str(signer)
    for secret in (signer.ed25519_seed(), signer.evm_private_key()):
        assert secret.hex() not in shown
        assert repr(secret) not in shown
    with pytest.raises(TypeError):
        pickle.dumps(signer)
