// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {BLS12381} from "./BLS12381.sol";

/// @title A committee kept as contract code: the cheapest memory that can be read in slices and never changes.
/// @notice Layout: 00 (so that calling it stops at once), sum of all keys (128), sum of all weights (16), then per
/// member 112 bytes: xHi(16) yHi(16) xLo(32) yLo(32) weight(16). 218 members fill the 24,576 bytes of a contract.
/// @dev Points come from the registry, which has proven them to be in the subgroup, so G1ADD cannot fail on them.
library CommitteeCode {
    uint256 internal constant MAX_MEMBERS = 218;
    uint256 internal constant KEY_BYTES = 96;
    uint256 private constant HEAD_BYTES = 145;
    uint256 private constant MEMBER_BYTES = 112;

    error TooManyMembers(uint256 members);
    error KeysMismatch();
    error AdditionFailed();

    /// @notice Deploy the snapshot. Returns zero when the deployment failed.
    /// @param keys KEY_BYTES bytes per member.
    function store(bytes memory keys, uint128[] memory weights)
        internal
        returns (address snapshot, uint256 totalWeight)
    {
        uint256 members = weights.length;
        if (members > MAX_MEMBERS) revert TooManyMembers(members);
        if (keys.length != members * KEY_BYTES) revert KeysMismatch();
        uint256 size = HEAD_BYTES + members * MEMBER_BYTES;
        // Creation code: PUSH2 size DUP1 PUSH1 10 RETURNDATASIZE CODECOPY RETURNDATASIZE RETURN, 10 bytes.
        bytes memory code = abi.encodePacked(hex"61", uint16(size), hex"80600a3d393df3", new bytes(size));
        uint256[8] memory frame; // sum, next
        bool ok = true;
        assembly ("memory-safe") {
            let entry := add(code, add(42, HEAD_BYTES)) // 32 length + 10 creation
            let key := add(keys, 0x20)
            for { let i := 0 } lt(i, members) { i := add(i, 1) } {
                mcopy(entry, key, KEY_BYTES)
                let high := mload(key)
                mstore(add(frame, 0x80), shr(128, high))
                mstore(add(frame, 0xa0), mload(add(key, 0x20)))
                mstore(add(frame, 0xc0), and(high, 0xffffffffffffffffffffffffffffffff))
                mstore(add(frame, 0xe0), mload(add(key, 0x40)))
                let added := staticcall(gas(), 0x0b, frame, 0x100, frame, 0x80)
                ok := and(ok, added)
                let weight := mload(add(weights, shl(5, add(i, 1))))
                totalWeight := add(totalWeight, weight)
                // 16 bytes: written before the next member, and the last one ends in the padding of `code`.
                weight := shl(128, weight)
                mstore(
                    add(entry, KEY_BYTES),
                    or(weight, and(mload(add(entry, KEY_BYTES)), sub(shl(128, 1), 1)))
                )
                entry := add(entry, MEMBER_BYTES)
                key := add(key, KEY_BYTES)
            }
            let head := add(code, 43) // after the 00
            mcopy(head, frame, 0x80)
            let after_ := and(mload(add(head, 0x80)), sub(shl(128, 1), 1))
            mstore(add(head, 0x80), or(shl(128, totalWeight), after_))
            snapshot := create(0, add(code, 0x20), mload(code))
        }
        if (!ok) revert AdditionFailed();
    }

    /// @notice Number of members of a snapshot.
    function count(address snapshot) internal view returns (uint256) {
        return (snapshot.code.length - HEAD_BYTES) / MEMBER_BYTES;
    }

    /// @notice Aggregate key and weight of the members in `signers`, which must lie below `members`.
    /// @dev Walks the smaller side: adds the signers, or takes the others from the stored total.
    function aggregate(address snapshot, uint256 members, uint256 signers)
        internal
        view
        returns (uint256[4] memory key, uint256 weight, uint256 totalWeight)
    {
        uint256[8] memory frame; // sum, next
        assembly ("memory-safe") {
            extcodecopy(snapshot, frame, 1, 0x90) // the total weight lands in the half of `next` that is rewritten
            totalWeight := shr(128, mload(add(frame, 0x80)))
        }
        bool inverted = 2 * popCount(signers) > members;
        uint256 bits = signers;
        if (inverted) bits = ~signers & ((1 << members) - 1); // members <= 218: the shift cannot overflow
        else (frame[0], frame[1], frame[2], frame[3]) = (0, 0, 0, 0);

        for (uint256 offset = HEAD_BYTES; bits != 0; (bits, offset) = (bits >> 1, offset + MEMBER_BYTES)) {
            if (bits & 1 == 1) weight += _addMember(frame, snapshot, offset, inverted);
        }
        if (inverted) weight = totalWeight - weight;
        key = [frame[0], frame[1], frame[2], frame[3]];
    }

    /// @dev Adds the key of the member at a code offset, or its negative, to the sum in `frame`.
    function _addMember(uint256[8] memory frame, address snapshot, uint256 offset, bool negated)
        private
        view
        returns (uint256 weight)
    {
        bool ok;
        (uint256 pHigh, uint256 pLow) = (BLS12381.P_HI, BLS12381.P_LO);
        assembly ("memory-safe") {
            let entry := mload(0x40) // scratch: 112 bytes
            extcodecopy(snapshot, entry, offset, MEMBER_BYTES)
            let high := mload(entry)
            let yHigh := and(high, 0xffffffffffffffffffffffffffffffff)
            let yLow := mload(add(entry, 0x40))
            if negated {
                // -y = p - y, borrowing from the upper word.
                yHigh := sub(sub(pHigh, yHigh), gt(yLow, pLow))
                yLow := sub(pLow, yLow)
            }
            mstore(add(frame, 0x80), shr(128, high))
            mstore(add(frame, 0xa0), mload(add(entry, 0x20)))
            mstore(add(frame, 0xc0), yHigh)
            mstore(add(frame, 0xe0), yLow)
            weight := shr(128, mload(add(entry, 0x60)))
            ok := staticcall(gas(), 0x0b, frame, 0x100, frame, 0x80)
        }
        if (!ok) revert AdditionFailed();
    }

    function popCount(uint256 word) internal pure returns (uint256 n) {
        for (; word != 0; ++n) {
            word &= word - 1;
        }
    }
}
