// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {PairingGas} from "../../src/PairingGas.sol";
import {IPeerRegistry} from "../../src/interfaces/IPeerRegistry.sol";
import {BlsSigner} from "../BlsSigner.sol";
import {Swarm} from "../Swarm.sol";

contract PeerRegistryTest is Swarm {
    address internal alice = makeAddr("alice");
    address internal mallory = makeAddr("mallory");
    uint256 internal secret = 42;

    function _proof(address operator, bytes memory key) internal view returns (bytes memory) {
        return BlsSigner.provePossession(
            secret, registry.possessionRoot(operator, keccak256(_peerId(operator)), keccak256(key))
        );
    }

    function _expectRefused(address operator, bytes memory key, bytes memory proof, bytes4 why) internal {
        bytes memory peerId = _peerId(operator);
        vm.expectPartialRevert(why);
        vm.prank(operator);
        registry.register(peerId, key, proof);
        assertFalse(registry.isRegistered(operator));
    }

    function test_registersAndReadsBack() public {
        bytes memory key = BlsSigner.publicKey(secret);
        vm.expectEmit();
        emit IPeerRegistry.Registered(alice, keccak256(_peerId(alice)), _peerId(alice), key);
        _register(alice, secret);
        (bytes memory peerId, bytes memory stored) = registry.peerOf(alice);
        assertEq(peerId, _peerId(alice));
        assertEq(stored, key);
        assertEq(registry.operatorOf(keccak256(peerId)), alice);
    }

    function test_refusesInfinityKey() public {
        // Its proof "holds": the signature at infinity pairs with the key at infinity for every message.
        _expectRefused(mallory, new bytes(128), new bytes(256), IPeerRegistry.InfinityKey.selector);
    }

    function test_refusesProofForAnotherOperator() public {
        bytes memory key = BlsSigner.publicKey(secret);
        _expectRefused(mallory, key, _proof(alice, key), IPeerRegistry.BadProofOfPossession.selector);
    }

    function test_refusesProofUnderVoteSuite() public {
        bytes memory key = BlsSigner.publicKey(secret);
        bytes32 root = registry.possessionRoot(alice, keccak256(_peerId(alice)), keccak256(key));
        _expectRefused(alice, key, BlsSigner.sign(secret, root), IPeerRegistry.BadProofOfPossession.selector);
    }

    function test_refusesProofForAnotherPeerId() public {
        bytes memory key = BlsSigner.publicKey(secret);
        bytes memory proof = BlsSigner.provePossession(
            secret, registry.possessionRoot(alice, keccak256(_peerId(mallory)), keccak256(key))
        );
        _expectRefused(alice, key, proof, IPeerRegistry.BadProofOfPossession.selector);
    }

    function test_refusesProofOnAnotherChain() public {
        bytes memory key = BlsSigner.publicKey(secret);
        bytes memory proof = _proof(alice, key);
        vm.chainId(1);
        _expectRefused(alice, key, proof, IPeerRegistry.BadProofOfPossession.selector);
    }

    function test_refusesInfinityProof() public {
        _expectRefused(
            alice, BlsSigner.publicKey(secret), new bytes(256), IPeerRegistry.BadProofOfPossession.selector
        );
    }

    function test_refusesDuplicateKey() public {
        _register(alice, secret);
        bytes memory key = BlsSigner.publicKey(secret);
        _expectRefused(mallory, key, _proof(mallory, key), IPeerRegistry.KeyTaken.selector);
    }

    function test_refusesDuplicatePeerIdAndSecondRegistration() public {
        _register(alice, secret);
        bytes memory key = BlsSigner.publicKey(7);
        bytes memory peerId = _peerId(alice);
        vm.expectRevert(abi.encodeWithSelector(IPeerRegistry.PeerIdTaken.selector, keccak256(peerId)));
        vm.prank(mallory);
        registry.register(peerId, key, new bytes(256));
        vm.expectRevert(abi.encodeWithSelector(IPeerRegistry.AlreadyRegistered.selector, alice));
        vm.prank(alice);
        registry.register(peerId, key, new bytes(256));
    }

    /// A precompile burns what it is given on a malformed point: the cap keeps the refusal cheap and named.
    function test_malformedPointsFailCleanly() public {
        bytes memory good = BlsSigner.publicKey(secret);
        bytes memory offCurve = BlsSigner.publicKey(secret);
        offCurve[127] ^= 0x01;
        bytes memory badPadding = BlsSigner.publicKey(secret);
        badPadding[0] = 0x01;
        // On the curve, outside the subgroup: x = 4 has y^2 = 68, a square; its order is not r.
        bytes memory wrongSubgroup =
            hex"00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000004000000000000000000000000000000000a989badd40d6212b33cffc3f3763e9bc760f988c9926b26da9dd85e928483446346b8ed00e1de5d5ea93e354abe706c";
        bytes[3] memory keys = [offCurve, badPadding, wrongSubgroup];
        for (uint256 i; i < keys.length; ++i) {
            bytes memory proof = _proof(alice, keys[i]);
            uint256 before = gasleft();
            _expectRefused(alice, keys[i], proof, IPeerRegistry.BadProofOfPossession.selector);
            assertLt(before - gasleft(), 400_000);
        }
        bytes memory badProof = _proof(alice, good);
        badProof[255] ^= 0x01;
        _expectRefused(alice, good, badProof, IPeerRegistry.BadProofOfPossession.selector);
    }

    function test_theSubgroupExampleIsOnTheCurve() public view {
        // G1ADD checks the curve and not the subgroup: so the case above fails for the reason it names.
        bytes memory point =
            hex"00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000004000000000000000000000000000000000a989badd40d6212b33cffc3f3763e9bc760f988c9926b26da9dd85e928483446346b8ed00e1de5d5ea93e354abe706c";
        (bool ok,) = address(0x0b).staticcall(bytes.concat(point, point));
        assertTrue(ok);
        (ok,) = address(0x0c).staticcall(bytes.concat(point, bytes32(uint256(1)))); // MSM does check
        assertFalse(ok);
    }

    function test_refusesMalformedLengths() public {
        bytes memory key = BlsSigner.publicKey(secret);
        _expectRefused(alice, new bytes(127), new bytes(256), IPeerRegistry.MalformedKey.selector);
        _expectRefused(alice, key, new bytes(255), IPeerRegistry.MalformedProof.selector);
        bytes memory proof = _proof(alice, key);
        vm.startPrank(alice);
        vm.expectRevert(IPeerRegistry.MalformedPeerId.selector);
        registry.register(new bytes(38), key, proof);
        vm.expectRevert(IPeerRegistry.MalformedPeerId.selector);
        registry.register(bytes.concat(_peerId(alice), hex"00"), key, proof);
    }

    function test_onlyTheOwnerMovesThePairingGasAndNeverBelowItsPrice() public {
        vm.prank(mallory);
        vm.expectRevert();
        registry.setPairingGas(200_000);
        vm.expectRevert(abi.encodeWithSelector(PairingGas.PairingGasTooLow.selector, 102_900));
        registry.setPairingGas(102_899);
        registry.setPairingGas(102_900);
        _register(alice, secret); // the floor is enough
    }
}
