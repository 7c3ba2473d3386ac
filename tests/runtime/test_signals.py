"""StopSignal: a signal is stored until the step ends, and all ranks stop together."""

import os
import signal

import pytest
import torch

from fradique.runtime.device import Runtime
from fradique.runtime.signals import StopSignal

CPU = Runtime(torch.device("cpu"), torch.float32, False)


def test_a_signal_is_stored_and_the_handler_restored():
    previous = signal.getsignal(signal.SIGTERM)
    stop = StopSignal()
    assert not stop.requested(CPU)
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested(CPU) and stop.name == "SIGTERM"
    stop.restore()
    assert signal.getsignal(signal.SIGTERM) is previous


def test_a_second_ctrl_c_stops_at_once():
    stop = StopSignal()
    try:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore()


class SignalDuringReduction:
    """No rank has received a signal; this process receives SIGTERM during the all-reduce."""

    def max(self, number):
        os.kill(os.getpid(), signal.SIGTERM)
        return [float(number)]


class OtherRanksWithoutSignal:
    """No other rank has received a signal."""

    def max(self, number):
        return [float(number)]


class OtherRankInterrupted:
    """Another rank has received Ctrl-C."""

    def max(self, number):
        return [float(max(number, signal.SIGINT))]


def test_a_signal_during_the_all_reduce_is_not_lost():
    stop = StopSignal()
    try:
        assert not stop.requested(SignalDuringReduction())
        assert stop.requested(OtherRanksWithoutSignal()) and stop.name == "SIGTERM"
    finally:
        stop.restore()


def test_a_signal_on_another_rank_stops_this_one():
    stop = StopSignal()
    try:
        assert stop.requested(OtherRankInterrupted()) and stop.name == "SIGINT"
    finally:
        stop.restore()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX only")
def test_nohup_is_respected():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    try:
        signal.raise_signal(signal.SIGHUP)
        assert stop.number == 0 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, previous)
