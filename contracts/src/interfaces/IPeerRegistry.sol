// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

/// @title Who an operator is in the swarm: one libp2p peer id and one BLS key per account.
/// @notice Decides that a BLS key belongs to the operator that registers it, by a proof of possession bound
/// to chain, contract, operator and peer id. Does not decide that the peer id belongs to it: the EVM has no
/// cheap Ed25519, so peers check the signed PeerRecord off chain.
interface IPeerRegistry {
    /// @notice An operator took up a peer id and a key. Both are final.
    /// @param peerId 38 bytes, identity multihash of an Ed25519 public key.
    /// @param blsKey 128 bytes, G1 point in EIP-2537 form.
    event Registered(address indexed operator, bytes32 indexed peerIdHash, bytes peerId, bytes blsKey);

    error AlreadyRegistered(address operator);
    error NotRegistered(address operator);
    error PeerIdTaken(bytes32 peerIdHash);
    error KeyTaken(bytes32 keyHash);
    error MalformedPeerId();
    error MalformedKey();
    error MalformedProof();
    error InfinityKey();
    /// @notice The pairing did not hold, or a point was not on the curve or not in the prime-order subgroup.
    error BadProofOfPossession();

    /// @notice Bind `msg.sender`, a peer id and a BLS key.
    /// @param peerId 38 bytes.
    /// @param blsKey 128 bytes, G1 in EIP-2537 form; not infinity, not registered before.
    /// @param proof 256 bytes, G2 in EIP-2537 form: the signature of `possessionRoot` under the suite
    /// BLS_POP_BLS12381G2_XMD:SHA-256_SSWU_RO_POP_. It is what makes adding keys safe against rogue keys.
    function register(bytes calldata peerId, bytes calldata blsKey, bytes calldata proof) external;

    /// @notice The 32-byte message that a proof of possession signs.
    function possessionRoot(address operator, bytes32 peerIdHash, bytes32 keyHash)
        external
        view
        returns (bytes32);

    function isRegistered(address operator) external view returns (bool);

    /// @notice Peer id and EIP-2537 key of an operator; reverts with NotRegistered.
    function peerOf(address operator) external view returns (bytes memory peerId, bytes memory blsKey);

    /// @notice The operator of a peer id, or zero.
    function operatorOf(bytes32 peerIdHash) external view returns (address);

    /// @notice 96 bytes per operator: xHi(16) yHi(16) xLo(32) yLo(32), the coordinates without padding.
    function packedKeys(address[] calldata operators) external view returns (bytes memory);
}
