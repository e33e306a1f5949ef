// Ends or restarts the machine, by whoever is its init.
#ifndef NOID_POWER_H
#define NOID_POWER_H

#include <stdint.h>

enum power_by { POWER_BY_IMAGE, POWER_BY_OURS, POWER_BY_NOBODY };

// `how` is POWER_OFF or POWER_REBOOT. Returns when it has been set in motion.
void power_change(uint8_t how, enum power_by by);

#endif
