// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

/// @title BLS signatures over BLS12-381 with keys in G1, on the precompiles of EIP-2537.
/// @notice Decides whether one signature of one 32-byte message holds for one (aggregate) key, in the suites of
/// proof-of-possession signatures (draft-irtf-cfrg-bls-signature, section 4.2.3). It does not refuse the key at
/// infinity: callers must, and must only add keys whose possession was proven.
/// @dev A point is big-endian words, each coordinate padded to 64 bytes: G1 is x y, G2 is x.c0 x.c1 y.c0 y.c1.
/// A precompile burns all the gas it was given when a point is malformed, so the one that sees foreign points
/// (pairing) gets a bounded share. Every call stands in a statement of its own: Yul evaluates arguments from
/// right to left, so a result read beside its call would be stale.
library BLS12381 {
    bytes internal constant SIGNATURE_DST = "BLS_SIG_BLS12381G2_XMD:SHA-256_SSWU_RO_POP_";
    bytes internal constant POSSESSION_DST = "BLS_POP_BLS12381G2_XMD:SHA-256_SSWU_RO_POP_";

    uint256 internal constant G1_BYTES = 128;
    uint256 internal constant G2_BYTES = 256;

    /// @dev The field's modulus, upper 16 and lower 32 bytes.
    uint256 internal constant P_HI = 0x1a0111ea397fe69a4b1ba7b6434bacd7;
    uint256 internal constant P_LO = 0x64774b84f38512bf6730d2a0f6b0f6241eabfffeb153ffffb9feffffffffaaab;

    /// @dev The negated generator of G1.
    uint256 private constant X_HI = 0x17f1d3a73197d7942695638c4fa9ac0f;
    uint256 private constant X_LO = 0xc3688c4f9774b905a14e3a3f171bac586c55e83ff97a1aeffb3af00adb22c6bb;
    uint256 private constant Y_HI = 0x114d1d6855d545a8aa7d76c8cf2e21f2;
    uint256 private constant Y_LO = 0x67816aef1db507c96655b9d5caac42364e6f38ba0ecb751bad54dcd6b939c2ca;

    error PrecompileFailed();

    /// @notice Whether e(key, H(message)) == e(G1, signature).
    /// @param signature G2_BYTES bytes; anything that is not a point of the subgroup is just false.
    /// @param pairingGas most gas to hand to the pairing.
    function verify(
        uint256[4] memory key,
        bytes32 message,
        bytes memory dst,
        bytes calldata signature,
        uint256 pairingGas
    ) internal view returns (bool) {
        uint256[8] memory hashed = hashToG2(message, dst);
        uint256[24] memory input; // (key, H(m)), (-G1, signature)
        uint256[1] memory output;
        bool ok;
        assembly ("memory-safe") {
            mcopy(input, key, 0x80)
            mcopy(add(input, 0x80), hashed, 0x100)
            mstore(add(input, 0x180), X_HI)
            mstore(add(input, 0x1a0), X_LO)
            mstore(add(input, 0x1c0), Y_HI)
            mstore(add(input, 0x1e0), Y_LO)
            calldatacopy(add(input, 0x200), signature.offset, 0x100)
            ok := staticcall(pairingGas, 0x0f, input, 0x300, output, 0x20)
            ok := and(ok, eq(returndatasize(), 0x20))
        }
        return ok && output[0] == 1;
    }

    /// @notice hash_to_curve of RFC 9380 for BLS12381G2_XMD:SHA-256_SSWU_RO_ and a 32-byte message.
    function hashToG2(bytes32 message, bytes memory dst) internal view returns (uint256[8] memory point) {
        uint256[8] memory u = hashToField(message, dst);
        uint256[16] memory mapped;
        bool ok;
        bool last;
        assembly ("memory-safe") {
            ok := staticcall(gas(), 0x11, u, 0x80, mapped, 0x100)
            last := staticcall(gas(), 0x11, add(u, 0x80), 0x80, add(mapped, 0x100), 0x100)
            ok := and(ok, last)
            last := staticcall(gas(), 0x0d, mapped, 0x200, point, 0x100)
            ok := and(ok, last)
        }
        if (!ok) revert PrecompileFailed();
    }

    /// @notice hash_to_field of RFC 9380, section 5.2: two elements of Fp2, that is four of Fp.
    function hashToField(bytes32 message, bytes memory dst) internal view returns (uint256[8] memory u) {
        bytes memory suffix = abi.encodePacked(dst, uint8(dst.length)); // DST_prime
        // expand_message_xmd, section 5.3.1: 64 zero bytes are the block of SHA-256, 256 the bytes wanted.
        bytes32 b0 = sha256(abi.encodePacked(bytes32(0), bytes32(0), message, uint16(256), uint8(0), suffix));
        bytes32 b = sha256(abi.encodePacked(b0, uint8(1), suffix));
        u[0] = uint256(b);
        bytes memory next = abi.encodePacked(b0, uint8(0), suffix);
        bool ok = true;
        assembly ("memory-safe") {
            let size := mload(next)
            for { let i := 2 } lt(i, 9) { i := add(i, 1) } {
                mstore(add(next, 0x20), xor(b0, b))
                mstore8(add(next, 0x40), i)
                let done := staticcall(gas(), 0x02, add(next, 0x20), size, 0x00, 0x20)
                ok := and(ok, done)
                b := mload(0x00)
                mstore(add(u, shl(5, sub(i, 1))), b)
            }
            // Each 64-byte element modulo p: modexp(element, 1, p).
            let frame := mload(0x40)
            mstore(frame, 0x40)
            mstore(add(frame, 0x20), 0x20)
            mstore(add(frame, 0x40), 0x40)
            mstore(add(frame, 0xa0), 1)
            mstore(add(frame, 0xc0), P_HI)
            mstore(add(frame, 0xe0), P_LO)
            for { let element := u } lt(element, add(u, 0x100)) { element := add(element, 0x40) } {
                mcopy(add(frame, 0x60), element, 0x40)
                let done := staticcall(gas(), 0x05, frame, 0x100, element, 0x40)
                ok := and(ok, done)
            }
        }
        if (!ok) revert PrecompileFailed();
    }

    function isInfinity(uint256[4] memory point) internal pure returns (bool) {
        return point[0] | point[1] | point[2] | point[3] == 0;
    }
}
