// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {PairingGas} from "./PairingGas.sol";
import {IPeerRegistry} from "./interfaces/IPeerRegistry.sol";
import {BLS12381} from "./libraries/BLS12381.sol";
import {CommitteeCode} from "./libraries/CommitteeCode.sol";

/// @notice See IPeerRegistry, which states the law of this contract.
contract PeerRegistry is IPeerRegistry, PairingGas {
    bytes32 private constant POP_TYPEHASH = keccak256(
        "Possession(uint256 chainId,address registry,address operator,bytes32 peerIdHash,bytes32 keyHash)"
    );
    /// @dev Identity multihash of a protobuf Ed25519 public key: 00 24 08 01 12 20, then 32 bytes of key.
    bytes6 private constant PEER_ID_PREFIX = 0x002408011220;
    uint256 private constant PEER_ID_BYTES = 38;

    struct Peer {
        uint256 high; // xHi(16) yHi(16): never zero for a registered peer, see register
        uint256 xLow;
        uint256 yLow;
        bytes32 ed25519; // the peer id without its prefix
    }

    mapping(address operator => Peer) private _peers;
    mapping(bytes32 peerIdHash => address) public override operatorOf;
    mapping(bytes32 keyHash => address) public operatorOfKey;

    constructor(address owner) PairingGas(owner) {}

    function register(bytes calldata peerId, bytes calldata blsKey, bytes calldata proof) external override {
        if (isRegistered(msg.sender)) revert AlreadyRegistered(msg.sender);
        if (peerId.length != PEER_ID_BYTES || bytes6(peerId[:6]) != PEER_ID_PREFIX) revert MalformedPeerId();
        if (blsKey.length != BLS12381.G1_BYTES) revert MalformedKey();
        if (proof.length != BLS12381.G2_BYTES) revert MalformedProof();
        uint256[4] memory key = abi.decode(blsKey, (uint256[4]));
        if (BLS12381.isInfinity(key)) revert InfinityKey();
        bytes32 peerIdHash = keccak256(peerId);
        bytes32 keyHash = keccak256(blsKey); // a point has one EIP-2537 encoding: the pairing refuses others
        if (operatorOf[peerIdHash] != address(0)) revert PeerIdTaken(peerIdHash);
        if (operatorOfKey[keyHash] != address(0)) revert KeyTaken(keyHash);
        // The pairing also proves that the key is in the subgroup, which G1ADD never checks.
        bytes32 root = possessionRoot(msg.sender, peerIdHash, keyHash);
        if (!BLS12381.verify(key, root, BLS12381.POSSESSION_DST, proof, pairingGas)) {
            revert BadProofOfPossession();
        }
        operatorOf[peerIdHash] = msg.sender;
        operatorOfKey[keyHash] = msg.sender;
        // No point of the curve has both upper halves zero by anything but infinity or a 2^-250 accident.
        _peers[msg.sender] = Peer(key[0] << 128 | key[2], key[1], key[3], bytes32(peerId[6:]));
        emit Registered(msg.sender, peerIdHash, peerId, blsKey);
    }

    function possessionRoot(address operator, bytes32 peerIdHash, bytes32 keyHash)
        public
        view
        override
        returns (bytes32)
    {
        return keccak256(
            abi.encode(POP_TYPEHASH, block.chainid, address(this), operator, peerIdHash, keyHash)
        );
    }

    function isRegistered(address operator) public view override returns (bool) {
        return _peers[operator].high != 0;
    }

    function peerOf(address operator)
        external
        view
        override
        returns (bytes memory peerId, bytes memory blsKey)
    {
        if (!isRegistered(operator)) revert NotRegistered(operator);
        Peer storage p = _peers[operator];
        uint256 high = p.high;
        peerId = abi.encodePacked(PEER_ID_PREFIX, p.ed25519);
        blsKey = abi.encode(high >> 128, p.xLow, uint256(uint128(high)), p.yLow);
    }

    function packedKeys(address[] calldata operators) external view override returns (bytes memory keys) {
        keys = new bytes(operators.length * CommitteeCode.KEY_BYTES);
        for (uint256 i; i < operators.length; ++i) {
            Peer storage p = _peers[operators[i]];
            (uint256 high, uint256 xLow, uint256 yLow) = (p.high, p.xLow, p.yLow);
            if (high == 0) revert NotRegistered(operators[i]);
            assembly ("memory-safe") {
                let at := add(add(keys, 0x20), mul(i, 96))
                mstore(at, high)
                mstore(add(at, 0x20), xLow)
                mstore(add(at, 0x40), yLow)
            }
        }
    }
}
