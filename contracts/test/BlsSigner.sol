// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {BLS12381} from "../src/libraries/BLS12381.sol";

/// @title Signs with BLS inside a test, on the precompiles. Never for a real key: the scalar is in calldata.
library BlsSigner {
    uint256 internal constant ORDER = 0x73eda753299d7d483339d80809a1d80553bda402fffe5bfeffffffff00000001;
    bytes internal constant GENERATOR =
        hex"0000000000000000000000000000000017f1d3a73197d7942695638c4fa9ac0fc3688c4f9774b905a14e3a3f171bac586c55e83ff97a1aeffb3af00adb22c6bb0000000000000000000000000000000008b3f481e3aaa0f1a09e30ed741d8ae4fcf5e095d5d00af600db18cb2c04b3edd03cc744a2888ae40caa232946c5e7e1";

    /// @notice 128 bytes, G1.
    function publicKey(uint256 secret) internal view returns (bytes memory) {
        return _call(0x0c, abi.encodePacked(GENERATOR, secret));
    }

    /// @notice 256 bytes, G2.
    function sign(uint256 secret, bytes32 message) internal view returns (bytes memory) {
        return _sign(secret, message, BLS12381.SIGNATURE_DST);
    }

    function provePossession(uint256 secret, bytes32 root) internal view returns (bytes memory) {
        return _sign(secret, root, BLS12381.POSSESSION_DST);
    }

    /// @notice Aggregate of many secrets' signatures of one message: the signature of the sum of the secrets.
    function sum(uint256[] memory secrets, uint256 chosen) internal pure returns (uint256 total) {
        for (uint256 i; i < secrets.length; ++i) {
            if (chosen >> i & 1 == 1) total = addmod(total, secrets[i], ORDER);
        }
    }

    function _sign(uint256 secret, bytes32 message, bytes memory dst) private view returns (bytes memory) {
        return _call(0x0e, abi.encodePacked(BLS12381.hashToG2(message, dst), secret));
    }

    function _call(uint160 precompile, bytes memory input) private view returns (bytes memory output) {
        bool ok;
        (ok, output) = address(precompile).staticcall(input);
        require(ok && output.length != 0, "precompile");
    }
}
